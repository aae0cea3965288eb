"""Prompts: read from a file, and checked before any model runs."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ppo_fast.checks import is_whole

# A text, or its token ids.
Prompt = str | list[int]


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


def check_prompts(prompts: Any) -> list[Prompt]:
    """Check that ``prompts`` are strings or lists of ids, at least one, and return them as a list.

    Raises:
        TypeError: ``prompts`` is one string or no list, has no end, or holds something else.
        ValueError: there are none.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts: got one string, expected a list of strings; pass [prompt]")
    if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping):
        raise TypeError(f"prompts: got {type(prompts).__name__}, expected a list of strings")
    if isinstance(prompts, (itertools.cycle, itertools.count, itertools.repeat)):
        raise TypeError(
            f"prompts: got itertools.{type(prompts).__name__}, which has no end; pass the list "
            "itself, from which train() draws again and again"
        )
    prompts = [_plain_ids(prompt) for prompt in prompts]
    if not prompts:
        raise ValueError("prompts: got an empty list, expected at least one prompt")
    for i, prompt in enumerate(prompts):
        is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not isinstance(prompt, str) and not is_ids:
            raise TypeError(
                f"prompts[{i}]: got {type(prompt).__name__}, expected a string or a list of ids"
            )
    return prompts


def _plain_ids(prompt: Any) -> Any:
    """Return ids in a tensor, an array or a tuple as a list; anything else as it is."""
    if hasattr(prompt, "tolist") and not isinstance(prompt, str):
        return prompt.tolist()
    if isinstance(prompt, (list, tuple)):
        return [int(token) if is_whole(token) else token for token in prompt]
    return prompt


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Tokenise prompts as the tokenizer does by default, for a model that continues them.

    Prompts that are ids stay as they are. Of a BOS token that both the text (from a chat template)
    and the tokenizer put first, one remains. An EOS token that the tokenizer appends is removed: a
    response follows.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    of_texts = iter(tokenizer(texts)["input_ids"] if texts else [])
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    encoded: list[list[int]] = []
    for prompt in prompts:
        if not isinstance(prompt, str):
            encoded.append(list(prompt))
            continue
        ids = list(next(of_texts))
        if bos and prompt.startswith(bos) and ids[:2] == [tokenizer.bos_token_id] * 2:
            written_twice = prompt.startswith(bos * 2)
            ids = ids if written_twice else ids[1:]
        if eos and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(eos):
            ids = ids[:-1]
        encoded.append(ids)
    return encoded


def check_prompt_ids(
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[Sequence[int]],
    max_length: int,
    limit: Limit | None,
    *,
    vocab_size: int,
) -> None:
    """Check that no prompt is empty, and that each leaves room for ``max_length`` response tokens.


    Raises:
        ValueError: a prompt is empty, leaves no room, or holds an id that is not below
            ``vocab_size``; it is named.
    """
    for i, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True)):
        if not ids:
            raise ValueError(
                f"prompts[{i}]: {prompt!r} is empty after tokenisation; remove it, or give the "
                "model something to start from"
            )
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            wrong = next(token for token in ids if not 0 <= token < vocab_size)
            raise ValueError(
                f"prompts[{i}]: holds the id {wrong}, expected ids from 0 to {vocab_size - 1}, "
                "the policy's vocabulary"
            )
        if limit is not None and len(ids) + max_length > limit.tokens:
            text = prompt if isinstance(prompt, str) else str(prompt)
            short = text if len(text) <= 60 else text[:57] + "..."
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
