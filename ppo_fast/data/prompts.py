"""Prompts: read from a file, and checked before any model runs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Limit(NamedTuple):
    """Max number of tokens of a sequence, and whose limit it is."""

    tokens: int
    of: str


def read_prompts(path: Path) -> list[str]:
    """Read prompts from a .txt (one a line, empty lines skipped), .jsonl or .csv file ("prompt").

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, a line without a "prompt", or no prompts at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--prompts: no file {path}")
    text = path.read_text("utf-8-sig")
    if path.suffix == ".txt":
        prompts = [line for line in text.split("\n") if line.strip()]
    elif path.suffix == ".jsonl":
        # not splitlines: JSON strings may hold U+2028 and its like
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        prompts = [_prompt_of(_json(line, path, n), path, n) for n, line in lines]
    elif path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(text))
        prompts = [_prompt_of(row, path, n) for n, row in enumerate(rows, 2)]
    else:
        raise ValueError(f"--prompts: {path} ends in {path.suffix!r}, expected .txt, .jsonl, .csv")
    if not prompts:
        raise ValueError(f"--prompts: {path} holds no prompts")
    return prompts


def _json(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"--prompts: {path} line {number} is not JSON: {error}") from error


def _prompt_of(record: Any, path: Path, number: int) -> str:
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise ValueError(f'--prompts: {path} line {number} has no "prompt" that is a string')
    return prompt


def check_prompts(prompts: Any) -> list[str]:
    """Check that ``prompts`` are strings, at least one, and return them as a list.

    Raises:
        TypeError: ``prompts`` is one string or no list, or holds something that is not a string.
        ValueError: there are none.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts: got one string, expected a list of strings; pass [prompt]")
    if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping):
        raise TypeError(f"prompts: got {type(prompts).__name__}, expected a list of strings")
    prompts = list(prompts)
    if not prompts:
        raise ValueError("prompts: got an empty list, expected at least one prompt")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts[{i}]: got {type(prompt).__name__}, expected a string")
    return prompts


def check_prompt_ids(
    prompts: Sequence[str],
    prompt_ids: Sequence[Sequence[int]],
    max_length: int,
    limit: Limit | None,
) -> None:
    """Check that no prompt is empty, and that each leaves room for ``max_length`` response tokens.

    Raises:
        ValueError: one does not (it is named, with its length and the limit).
    """
    for i, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True)):
        if not ids:
            raise ValueError(
                f"prompts[{i}]: {prompt!r} is empty after tokenisation; remove it, or give the "
                "model something to start from"
            )
        if limit is not None and len(ids) + max_length > limit.tokens:
            short = prompt if len(prompt) <= 60 else prompt[:57] + "..."
            raise ValueError(
                f"prompts[{i}]: {short!r} has {len(ids)} tokens; with max_length={max_length} "
                f"that exceeds {limit.of}; shorten the prompt or lower max_length to "
                f"{max(limit.tokens - len(ids), 0)}"
            )


def check_lengths(lengths: Sequence[int], limit: Limit | None) -> None:
    """Raise ValueError if one of the sequences' ``lengths`` exceeds the limit."""
    longest = max(lengths, default=0)
    if limit is not None and longest > limit.tokens:
        raise ValueError(f"the longest sequence has {longest} tokens, which exceeds {limit.of}")
