"""Preference pairs: read from rows of data, checked, and split into two parts."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ppo_fast.rewards.encoding import common_prefix

logger = logging.getLogger(__name__)

NAMES = {"chosen": ("chosen", "response_chosen"), "rejected": ("rejected", "response_rejected")}

Message = dict[str, Any]
Prompt = str | list[Message]


@dataclass(frozen=True)
class Response:
    """A response to a prompt.

    prompt: a text, or the chat before the response.
    completion: the response's text.
    """

    prompt: Prompt
    completion: str

    @property
    def messages(self) -> list[Message]:
        """The whole chat; a prompt that is a text is one message of the user."""
        asked = self.prompt
        before = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        return [*before, {"role": "assistant", "content": self.completion}]


@dataclass(frozen=True)
class Pair:
    """Two responses, of which one is preferred, by ``margin`` if that is known."""

    chosen: Response
    rejected: Response
    margin: float = 0.0

    @property
    def is_chat(self) -> bool:
        """Whether its prompt is a chat."""
        return not isinstance(self.chosen.prompt, str)


def read_pairs(rows: Any, *, use_margin: bool = False, name: str = "pairs") -> list[Pair]:
    """Read preference pairs from rows of data.

    Args:
        rows: a list of mappings, or a ``datasets.Dataset``, with "prompt", "chosen" and "rejected"
            (or "response_chosen" and "response_rejected"). A prompt is a text or a chat (a list of
            messages); a response is a text, a message, or a list of messages that ends with the
            assistant's, with or without the prompt's before it. Without "prompt", responses that
            are chats have it in them, and of texts it is what both begin with.
        use_margin: read "margin", a number, from each row.
        name: the argument's name in errors.

    Raises:
        TypeError: ``rows`` is no list of mappings.
        ValueError: a column is missing, a text is empty, both responses are equal, or a margin is
            no finite number; the row's index is named.
    """
    if isinstance(rows, (str, Mapping)) or not isinstance(rows, Iterable):
        raise TypeError(f"{name}: got {type(rows).__name__}, expected a list of rows (dicts)")
    pairs, has_margins = [], False
    for i, row in enumerate(rows):
        what = f"{name}[{i}]"
        if not isinstance(row, Mapping):
            raise TypeError(
                f"{what}: got {type(row).__name__}, expected a dict with prompt, chosen, rejected"
            )
        pairs.append(_read_pair(row, use_margin, what))
        has_margins = has_margins or row.get("margin") is not None
    if not pairs:
        raise ValueError(f"{name}: there are none, expected at least one pair")
    if has_margins and not use_margin:
        logger.info('%s: the column "margin" is not used; use_margin=True does', name)
    return pairs


def split(count: int, share: float | None, seed: int) -> tuple[list[int], list[int]]:
    """Divide the indices of pairs into those to train on and those held out.

    Args:
        count: number of pairs.
        share: share of the second part, in (0, 1), at least one pair, drawn by ``seed``; None: 0.

    Raises:
        ValueError: it is no share, or leaves no pair to train on.
    """
    if share is None:
        return list(range(count)), []
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ValueError(
            f"held_out: got {share!r:.60}, expected a share in (0, 1), a list of pairs, or None"
        )
    held_out = max(1, round(share * count))
    if held_out >= count:
        raise ValueError(
            f"held_out: got {share}, {held_out} of {count} pairs, which leaves none to train on; "
            "give more pairs, or held_out=None"
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(count, generator=generator, device="cpu").tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def _read_pair(row: Mapping[str, Any], use_margin: bool, what: str) -> Pair:
    sides = {}
    for side, names in NAMES.items():
        column = next((name for name in names if row.get(name) is not None), None)
        if column is None:
            raise ValueError(
                f'{what}: has no "{side}"; it has the columns {", ".join(map(str, row))}'
            )
        sides[side] = (row[column], f"{what}: {column}")
    prompt = row.get("prompt")
    if prompt is None and all(isinstance(given, str) for given, _ in sides.values()):
        chosen, rejected = (Response("", given) for given, _ in sides.values())
        _check(chosen, rejected, what)
        chosen, rejected = _split_texts(chosen.completion, rejected.completion)
    else:
        if prompt is not None:
            prompt = _prompt(prompt, f"{what}: prompt")
        chosen, rejected = (_response(prompt, *side) for side in sides.values())
        _check(chosen, rejected, what)
    if not use_margin:
        return Pair(chosen, rejected)
    return Pair(chosen, rejected, _margin(row.get("margin"), what))


def _margin(given: Any, what: str) -> float:
    try:  # a number is a text in a .csv file
        margin = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        margin = math.nan
    if not math.isfinite(margin):
        raise ValueError(f"{what}: margin is {given!r}, expected a finite number")
    return margin


def _check(chosen: Response, rejected: Response, what: str) -> None:
    for side, response in (("chosen", chosen), ("rejected", rejected)):
        if not response.completion.strip():
            raise ValueError(f"{what}: the {side} response is empty; leave the pair out")
    if chosen == rejected:
        raise ValueError(
            f"{what}: both responses are the same, {chosen.completion!r:.60}; leave the pair out"
        )


def _split_texts(chosen: str, rejected: str) -> tuple[Response, Response]:
    """Divide two texts into the words that both begin with, the prompt, and the rest.

    No rest is blank.
    """
    end = min(common_prefix(chosen, rejected), len(chosen.rstrip()), len(rejected.rstrip()))
    start = max(chosen.rfind(space, 0, end) for space in " \n")
    start = max(start, 0)  # the space is the response's, as tokenizers have it
    return Response(chosen[:start], chosen[start:]), Response(rejected[:start], rejected[start:])


def _prompt(given: Any, what: str) -> Prompt:
    if isinstance(given, str):
        return given
    return _messages(given, what)


def _response(prompt: Prompt | None, given: Any, what: str) -> Response:
    """Return a response from a text, a message, or a chat that ends with it."""
    if isinstance(given, str):
        if prompt is None:
            raise ValueError(f"{what} is a text, and the other response is a chat; give a prompt")
        return Response(prompt, given)
    chat = _messages([given] if isinstance(given, Mapping) else given, what)
    if chat[-1]["role"] != "assistant":
        raise ValueError(
            f'{what} ends with a message of "{chat[-1]["role"]}", expected one of the assistant'
        )
    before, completion = chat[:-1], chat[-1]["content"]
    if before:  # a whole chat
        return Response(before, completion)
    if prompt is None:
        raise ValueError(f"{what} has one message, and there is no prompt; add the chat before it")
    return Response(prompt, completion)


def _messages(given: Any, what: str) -> list[Message]:
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ValueError(f"{what}: got {given!r:.60}, expected a text or a list of messages")
    for message in given:
        is_message = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not is_message or not isinstance(message.get("content"), str):
            raise ValueError(
                f'{what}: got the message {message!r:.60}, expected {{"role": ..., "content": ...}}'
                " with texts"
            )
    return [dict(message) for message in given]
