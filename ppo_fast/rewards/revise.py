"""Constitutional AI: critiques and revisions of responses, and pairs that a constitution labels.

Bai et al. 2022: in its first phase a model learns from its own revised responses (section 3), in
its second from the preferences of a model that compares two responses (section 4).

What asks a model to write is ``generate(requests) -> texts``, given by the caller: for example
``lambda requests: ppo.rollout(requests).completions``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from ppo_fast.rewards.constitution import Constitution
from ppo_fast.rewards.principles import Principle
from ppo_fast.rewards.questions import fill

logger = logging.getLogger(__name__)

# Takes n requests and returns n texts.
Generate = Callable[[list[str]], Sequence[str]]


def critique(
    generate: Generate, prompts: Sequence[str], responses: Sequence[str], principle: Principle
) -> list[str]:
    """Ask for critiques of responses, by the principle's template ``critique``.

    Args:
        generate: writes a text for each request.
        prompts, responses: n texts each.
        principle: what the responses should keep.

    Returns:
        n texts, without white space around them.

    Raises:
        ValueError: the numbers of prompts and responses differ, or ``generate`` gives another.
    """
    rows = [
        {"prompt": p, "completion": r, "description": principle.description}
        for p, r in _pairs(prompts, responses, "responses")
    ]
    return _written(generate, [fill(principle.critique, row) for row in rows])


def revise(
    generate: Generate,
    prompts: Sequence[str],
    responses: Sequence[str],
    critiques: Sequence[str],
    principle: Principle,
) -> list[str]:
    """Ask for responses revised by their critiques, by the principle's template ``revision``.

    The arguments, the result and the errors are those of ``critique``.
    """
    rows = [
        {"prompt": p, "completion": r, "critique": c, "description": principle.description}
        for (p, r), c in _pairs(_pairs(prompts, responses, "responses"), critiques, "critiques")
    ]
    return _written(generate, [fill(principle.revision, row) for row in rows])


def supervised_pairs(
    generate: Generate,
    prompts: Sequence[str],
    principles: Sequence[Principle],
    *,
    responses: Sequence[str] | None = None,
) -> list[dict[str, str]]:
    """Make examples to fine-tune on: each prompt with its response, revised by every principle.

    Args:
        generate: writes a text for each prompt and each request.
        prompts: n texts.
        principles: in the order in which responses are revised.
        responses: n texts to begin with; None: ``generate`` writes them.

    Returns:
        Rows of "prompt" and "completion". An empty completion is left out; a log line counts them.

    Raises:
        ValueError: as ``critique`` has it.
    """
    revised = _written(generate, list(prompts)) if responses is None else list(responses)
    for principle in principles:
        critiques = critique(generate, prompts, revised, principle)
        revised = revise(generate, prompts, revised, critiques, principle)
    pairs = _pairs(prompts, revised, "responses")
    rows = [{"prompt": p, "completion": text} for p, text in pairs if text.strip()]
    if len(rows) < len(revised):
        logger.warning(
            "supervised_pairs: left out %d of %d responses, which are empty after revision",
            *(len(revised) - len(rows), len(revised)),
        )
    return rows


def preference_pairs(
    constitution: Constitution,
    prompts: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    *,
    min_difference: float = 0.0,
    margins: bool = False,
) -> list[dict[str, Any]]:
    """Label pairs of responses by a constitution: the one with the higher score is chosen.

    Args:
        constitution: has a judge, if it asks questions.
        prompts, first, second: n texts each; two responses to each prompt.
        min_difference: pairs whose scores differ by no more than this are left out.
        margins: whether rows have the "margin" too, the difference of their scores in (0, 1].

    Returns:
        Rows of "prompt", "chosen" and "rejected", as ``train_reward_model`` takes them. Equal
            responses and those with scores too near to one another are left out; a log line counts
            both.

    Raises:
        ValueError: the numbers of texts differ.
        RuntimeError: the constitution asks questions and has no judge.
    """
    if not 0 <= min_difference < 1:
        raise ValueError(f"min_difference: got {min_difference!r}, expected a number in [0, 1)")
    rows = [(*row, b) for row, b in _pairs(_pairs(prompts, first, "first"), second, "second")]
    different = [(prompt, a, b) for prompt, a, b in rows if a != b]
    asked = [prompt for prompt, _, _ in different]
    scores = (constitution.scores(asked, [row[i] for row in different]) for i in (1, 2))
    pairs = []
    for (prompt, a, b), x, y in zip(different, *scores, strict=True):
        if abs(x - y) > min_difference:
            chosen, rejected = (a, b) if x > y else (b, a)
            row: dict[str, Any] = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            pairs.append(row | ({"margin": abs(x - y)} if margins else {}))
    if len(pairs) < len(rows):
        logger.warning(
            "preference_pairs: left out %d of %d pairs: %d of equal responses, %d with scores that "
            "differ by no more than %g",
            *(
                len(rows) - len(pairs),
                len(rows),
                len(rows) - len(different),
                len(different) - len(pairs),
                min_difference,
            ),
        )
    return pairs


def _pairs(prompts: Sequence[Any], texts: Sequence[str], name: str) -> list[tuple[Any, str]]:
    if len(prompts) != len(texts):
        raise ValueError(f"{name}: got {len(texts)}, expected {len(prompts)}, one a prompt")
    return list(zip(prompts, texts, strict=True))


def _written(generate: Generate, requests: list[str]) -> list[str]:
    texts = list(generate(requests)) if requests else []
    if len(texts) != len(requests):
        raise ValueError(f"generate: gave {len(texts)} texts for {len(requests)} requests")
    return [text.strip() for text in texts]
