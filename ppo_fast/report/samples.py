"""Samples of the first and of the last step, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from ppo_fast.report.axes import number
from ppo_fast.report.html import MISSING, Html, cut, element
from ppo_fast.report.lines import Record, as_number
from ppo_fast.report.read import Ends, Run
from ppo_fast.report.tokens import Scale, coloured, legend, scales, tokens_of

MOST_PAIRS = 24  # of all runs
LONGEST_PROMPT, LONGEST_COMPLETION, LONGEST_COLUMN = 2000, 4000, 200
MOST_NUMBERS = 20

Pair = tuple[Record | None, Record | None]


class Part(NamedTuple):
    """Pairs of samples, and what they are."""

    what: str
    pairs: list[Pair]


def samples(runs: Sequence[Run]) -> Html | None:
    """Return samples of each run, before and after; None where no run has some."""
    most = 8 if len(runs) == 1 else max(MOST_PAIRS // len(runs), 2)
    by_run = [(run, _parts(run, most)) for run in runs]
    pairs = [pair for _, parts in by_run for part in parts for pair in part.pairs]
    shown = [sample for pair in pairs for sample in pair if sample is not None]
    if not shown:
        return None
    by_name = scales(shown)
    contents = []
    for run, parts in by_run:
        if len(runs) > 1:
            contents.append(element("h3", cut(run.name, 60)))
        for part in parts:
            contents.append(element("p", part.what, class_="hint"))
            contents += [_pair(pair, by_name) for pair in part.pairs]
    inside = element("div", *contents, class_="samples")
    if not by_name:
        return inside
    return element(
        "fieldset", element("legend", "Colour of a token"), *legend(by_name), inside,
        class_="colours",
    )  # fmt: skip


def _parts(run: Run, most: int) -> list[Part]:
    """Return the samples of evaluations; also those of training, if they alone have tokens."""
    parts = []
    evaluated = run.evaluation_samples.first + run.evaluation_samples.last
    if evaluated:
        parts.append(_of_evaluations(run.evaluation_samples, most))
    trained = run.samples.first + run.samples.last
    if trained and not any(map(tokens_of, evaluated)) and (
        not evaluated or any(map(tokens_of, trained))
    ):  # fmt: skip
        parts.append(_of_training(run.samples, min(most, 4) if evaluated else most))
    return parts or [Part("This run has no samples.", [])]


def _of_evaluations(ends: Ends, most: int) -> Part:
    if same_step(ends):
        what = f"Responses of the one evaluation, at step {ends.last[0]['step']}."
        return Part(what, [(sample, None) for sample in _chosen(ends.last, most)])
    after = {text_of(s.get("prompt")): s for s in _chosen(ends.last, len(ends.last))}
    both = [sample for sample in ends.first if text_of(sample.get("prompt")) in after]
    return Part(
        "Responses to the same prompts, at the first and at the last evaluation.",
        [(sample, after[text_of(sample.get("prompt"))]) for sample in _chosen(both, most)],
    )


def _of_training(ends: Ends, most: int) -> Part:
    if same_step(ends):
        what = f"Responses of step {ends.last[0]['step']} of training."
        return Part(what, [(sample, None) for sample in _chosen(ends.last, most)])
    pairs = zip(_chosen(ends.first, most), _chosen(ends.last, most), strict=False)
    return Part("Responses of the first and of the last step of training.", [*pairs])


def same_step(ends: Ends) -> bool:
    """Say whether there are samples of one step alone."""
    return not ends.first or ends.first[0]["step"] == ends.last[0]["step"]


def _chosen(found: Sequence[Record], most: int) -> list[Record]:
    """Return the first samples to different prompts; those with numbers of tokens come first."""
    by_prompt: dict[str, Record] = {}
    for sample in sorted(found, key=lambda sample: tokens_of(sample) is None):
        by_prompt.setdefault(text_of(sample.get("prompt")), sample)
    return [*by_prompt.values()][:most]


def _pair(pair: Pair, by_name: dict[str, Scale]) -> Html:
    first, last = pair
    assert first is not None
    shared = last is None or text_of(last.get("prompt")) == text_of(first.get("prompt"))
    cards = [_sample(s, by_name, with_prompt=not shared) for s in pair if s is not None]
    prompt = _prompt(first) if shared else None
    return element("article", prompt, element("div", *cards, class_="pair"))


def _prompt(sample: Record) -> Html:
    text = cut(text_of(sample.get("prompt")), LONGEST_PROMPT)
    return element("p", text, class_="text prompt", dir="auto")


def _sample(sample: Record, by_name: dict[str, Scale], *, with_prompt: bool) -> Html:
    tokens = tokens_of(sample)
    if tokens is None:
        text = cut(text_of(sample.get("completion")), LONGEST_COMPLETION)
        body = element("p", text, class_="text", dir="auto")
    else:
        body = coloured(tokens, by_name, len(sample["tokens"]["text"]))
    score = as_number(sample.get("score"))
    head = element(
        "p",
        element("span", f"step {sample['step']}"),
        element("b", f"score {MISSING if score is None else number(score)}"),
        class_="head",
    )
    return element(
        "div", head, _prompt(sample) if with_prompt else None, body, _more(sample), class_="sample"
    )


def _more(sample: Record) -> Html | None:
    """Return the single rewards and the columns of a sample; None if it has none."""
    parts = []
    for name in ("rewards", "columns"):
        found = sample.get(name)
        for key, value in [*found.items()][:MOST_NUMBERS] if isinstance(found, dict) else ():
            size = as_number(value)
            text = MISSING if value is None else text_of(value) if size is None else number(size)
            parts.append(
                element("span", f"{cut(key, 60)}: {cut(text, LONGEST_COLUMN)}", class_="chip")
            )
    return element("p", *parts, class_="chips") if parts else None


def text_of(value: Any) -> str:
    """Return a text as it is, the messages of a chat a paragraph each, other values as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(
        isinstance(one, dict) and isinstance(one.get("content"), str) for one in value
    ):  # fmt: skip
        return "\n\n".join(f"{one.get('role', '')}: {one['content']}" for one in value)
    return json.dumps(value, ensure_ascii=False)
