"""Samples of the first and of the last step, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ppo_fast.report.axes import number
from ppo_fast.report.html import MISSING, Html, cut, element
from ppo_fast.report.lines import Record, as_number
from ppo_fast.report.read import Ends, Run
from ppo_fast.report.tokens import Scale, coloured, legend, scales, tokens_of

MOST_PAIRS = 24  # of all runs
LONGEST_PROMPT, LONGEST_COMPLETION, LONGEST_COLUMN = 2000, 4000, 200
MOST_NUMBERS = 20

Pair = tuple[Record | None, Record | None]


def samples(runs: Sequence[Run]) -> Html | None:
    """Return samples of each run, before and after; None where no run has some."""
    most = max(MOST_PAIRS // len(runs), 2) if len(runs) > 1 else 8
    by_run = [(run, *_pairs(run, most)) for run in runs]
    shown = [s for _, _, pairs in by_run for pair in pairs for s in pair if s is not None]
    if not shown:
        return None
    by_name = scales(shown)
    parts = []
    for run, what, pairs in by_run:
        if len(runs) > 1:
            parts.append(element("h3", cut(run.name, 60)))
        parts.append(element("p", what, class_="hint"))
        parts += [_pair(pair, by_name) for pair in pairs]
    inside = element("div", *parts, class_="samples")
    if not by_name:
        return inside
    return element(
        "fieldset", element("legend", "Colour of a token"), *legend(by_name), inside,
        class_="colours",
    )  # fmt: skip


def _pairs(run: Run, most: int) -> tuple[str, list[Pair]]:
    """Return what the samples of a run are, and at most ``most`` pairs of them."""
    ends = run.evaluation_samples
    if ends.first or ends.last:
        if same_step(ends):
            what = f"Responses of the one evaluation, at step {ends.first[0]['step']}."
            return what, [(sample, None) for sample in _chosen(ends.first, most)]
        after = {text_of(s.get("prompt")): s for s in _chosen(ends.last, len(ends.last))}
        both = [s for s in ends.first if text_of(s.get("prompt")) in after]
        what = "Responses to the same prompts, at the first and at the last evaluation."
        return what, [
            (sample, after[text_of(sample.get("prompt"))]) for sample in _chosen(both, most)
        ]
    ends = run.samples
    if not ends.first:
        return "This run has no samples.", []
    if same_step(ends):
        return "Responses of the one step.", [(s, None) for s in _chosen(ends.first, most)]
    pairs = zip(_chosen(ends.first, most), _chosen(ends.last, most), strict=False)
    return "Responses of the first and of the last step of training; their prompts differ.", [
        *pairs
    ]


def same_step(ends: Ends) -> bool:
    """Say whether the first samples are those of the last step."""
    return bool(ends.first and ends.last) and ends.first[0]["step"] == ends.last[0]["step"]


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
