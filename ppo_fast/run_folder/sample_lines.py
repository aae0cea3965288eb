"""Lines of samples.jsonl and evaluation_samples.jsonl: a sequence, its scores and its tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppo_fast.data.rollout import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 5  # prompt tokens that are decoded with a response, for the space before its first word


def sample_lines(
    step: int, rollout: Rollout, scores: Tensor, rewards: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Return a line for each sequence.

    Args:
        step: its number.
        rollout: B sequences with their texts.
        scores: [B].
        rewards: [B] by name, NaN where one does not judge; the lines have them where there are
            several.
    """
    parts = {name: part.tolist() for name, part in rewards.items()}
    columns = rollout.columns
    lines = []
    rows = zip(rollout.prompts, rollout.completions, scores.tolist(), strict=True)
    for i, (prompt, completion, score) in enumerate(rows):
        line: dict[str, Any] = {
            "step": step, "prompt": prompt, "completion": completion, "score": or_none(score),
        }  # fmt: skip
        if len(parts) > 1:
            line["rewards"] = {name: or_none(part[i]) for name, part in parts.items()}
        if columns:
            line["columns"] = {name: _as_json(values[i]) for name, values in columns.items()}
        lines.append(line)
    return lines


def token_lines(
    rollout: Rollout,
    per_token: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
) -> list[dict[str, list[Any]]]:
    """Return the response tokens of the first ``count`` sequences: their texts and numbers.

    Args:
        rollout: B sequences.
        per_token: [B, T] by name; they are rounded to four significant digits.
        tokenizer: the policy's.
        count: of the sequences.
    """
    tokens = rollout.tokens.select(torch.arange(min(count, len(rollout.tokens)), device="cpu"))
    rows = zip(tokens.sequences(), tokens.prompt_lengths.tolist(), strict=True)
    found = []
    for i, (row, prompt) in enumerate(rows):
        ids = row.tolist()
        line: dict[str, list[Any]] = {"text": token_texts(tokenizer, ids[:prompt], ids[prompt:])}
        for name, numbers in per_token.items():
            line[name] = [_rounded(x) for x in numbers[i, : len(ids) - prompt].tolist()]
        found.append(line)
    return found


def token_texts(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], response: Sequence[int]
) -> list[str]:
    """Return the text of each token of a response; joined, they are the response's text.

    A character of several tokens is the text of the last of them, and the others have "". Special
    tokens have their names, as "<eos>".
    """

    def decode(tokens: Sequence[int]) -> str:
        return tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    ids, texts = [*prompt[-CONTEXT:], *response], []
    first = len(ids) - len(response)
    # ids[start:read] are decoded with each next token: with some tokenizers a text depends on
    # the token before it
    start, read = 0, first
    for end in range(first + 1, len(ids) + 1):
        before, now = decode(ids[start:read]), decode(ids[start:end])
        if now.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            texts.append("")  # part of a character
            continue
        texts.append(now[len(before) :] if now.startswith(before) else decode(ids[read:end]))
        start, read = read, end
    return texts


def or_none(value: float) -> float | None:
    """Return None for a number that JSON does not have."""
    return value if math.isfinite(value) else None


def _rounded(value: float) -> float | None:
    return or_none(float(f"{value:.4g}"))


def _as_json(value: Any) -> Any:
    """Return ``value``, or as a text if JSON does not have it."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return str(value)
    return value
