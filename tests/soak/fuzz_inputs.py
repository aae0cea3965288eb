"""Random prompts and reward functions: some that fit, some that no one should give."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from tiny_trainer import count_letters
from torch import nn

NAN, INF = float("nan"), float("inf")


class OwnError(Exception):
    """Raised by rewards; it must reach the caller, as it is or as the cause of ours."""


FITTING_TEXTS = ("The film was", "She thought", "There", "a", " ", "émile", "日本", "\U0001f600 ok")
STRANGE_TEXTS = ("", "\0", "\x1b[31m", "\ud800", "\u202e", "a" * 5000, "\n" * 50, "<|end|>",
                 "<|pad|>", "\ufffe", "x\udfff")  # fmt: skip
STRANGE_PROMPTS = (
    None, 3, 1.5, NAN, b"bytes", True, [], [0], [1, 2, 3], [-1], [306], [307], [2**63], [1.0, 2.0],
    [True, False], (3, 4), np.array([3, 4]), np.array([[3, 4]]), np.array([]), torch.tensor([3, 4]),
    torch.tensor(3), torch.tensor([1.5]), [None], ["a", "b"], [[3, 4]], [5] * 120, [5] * 127,
    [5] * 5000, {}, {"prompt": "There"}, {"prompt": None}, {"prompt": NAN}, {"prompt": ""},
    {"text": "There"}, {"prompt": "There", "answer": NAN}, {"prompt": "There", "prompts": "x"},
    {"prompt": [3, 4], "answer": 3}, {3: "x", "prompt": "There"}, {"prompt": {"a": 1}},
    [{"role": "user", "content": "Hi"}], [{"role": "user"}], [{"content": "Hi"}], [{}],
    [{"role": 3, "content": "Hi"}], [{"role": "user", "content": None}],
    {"messages": [{"role": "user", "content": "Hi"}]}, {"messages": []}, object(), len, nn.Linear,
)  # fmt: skip


def prompts(draw: random.Random) -> Any:
    """Return prompts; one in three is strange, or all of them together are."""
    found: list[Any] = []
    strange = draw.random() < 1 / 3
    for _ in range(draw.choice((1, 2, 3, 5))):
        if strange and draw.random() < 0.5:
            found.append(draw.choice(STRANGE_TEXTS + STRANGE_PROMPTS))
        else:
            found.append(draw.choice(FITTING_TEXTS))
    if draw.random() < 0.9:
        return found
    containers: tuple[Callable[[], Any], ...] = (
        lambda: tuple(found), lambda: iter(found), lambda: (x for x in found), list,
        lambda: None, lambda: "There", lambda: 3, lambda: {"prompt": found}, lambda: {"a": "b"},
        lambda: np.array(["There", "a"]), lambda: torch.tensor([[3, 4], [5, 6]]), lambda: object(),
        lambda: {"There", "a"}, lambda: map(str, found), lambda: [found], lambda: Endless(),
    )  # fmt: skip
    return draw.choice(containers)()


class Endless:
    """A stream of prompts, as data sets that are streamed."""

    def __iter__(self) -> Any:
        return iter([{"prompt": "There"}, {"prompt": "a"}])


def _returning(make: Callable[[list[float]], Any]) -> Callable[..., Any]:
    """Return a reward that returns ``make`` of what a good one does."""

    def reward(prompts: list[str], completions: list[str]) -> Any:
        return make(count_letters(prompts, completions))

    return reward


def _raising(error: BaseException) -> Callable[..., Any]:
    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        raise error

    return reward


async def _async(prompts: list[str], completions: list[str]) -> list[float]:
    await asyncio.sleep(0)
    return count_letters(prompts, completions)


async def _async_raising(prompts: list[str], completions: list[str]) -> list[float]:
    raise OwnError("mine")


def _emptying(prompts: list[str], completions: list[str]) -> list[float]:
    found = count_letters(prompts, completions)
    prompts.clear()
    completions.clear()
    return found


class _Module(nn.Module):
    """A reward model that returns zeros of some shape."""

    def __init__(self, shape: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.shape(input_ids)


MADE: tuple[Callable[[list[float]], Any], ...] = (
    lambda x: x[:-1], lambda x: [*x, 1.0], lambda x: [], lambda x: None, lambda x: 1.0,
    lambda x: NAN, lambda x: "good", lambda x: ["1.0"] * len(x), lambda x: [None] * len(x),
    lambda x: [NAN] * len(x), lambda x: [INF, *x[1:]], lambda x: [None, *x[1:]],
    lambda x: [1e308] * len(x), lambda x: [10**400] * len(x), lambda x: [1j] * len(x),
    lambda x: [[v] for v in x], lambda x: [[1.0, 2.0]] * len(x), lambda x: [[1.0] * 4] * len(x),
    lambda x: [[]] * len(x), lambda x: {}, lambda x: {"a": x, "b": x}, lambda x: {"a": x[:-1]},
    lambda x: {"a": None}, lambda x: {3: x}, lambda x: {"": x}, lambda x: {"a/b": x},
    lambda x: {"a": {"b": x}}, lambda x: tuple(x), lambda x: iter(x), lambda x: (v for v in x),
    lambda x: {*x}, lambda x: np.array(x), lambda x: np.array(x, dtype=object),
    lambda x: np.array([x]), lambda x: np.array(3.0), lambda x: np.array(["a"] * len(x)),
    lambda x: torch.tensor(x), lambda x: torch.tensor(x, requires_grad=True),
    lambda x: torch.tensor(x)[:, None], lambda x: torch.tensor(x).bool(),
    lambda x: torch.zeros(len(x), 4), lambda x: torch.zeros(len(x), 3, 2),
    lambda x: torch.tensor(1),
    lambda x: torch.zeros(len(x), device="meta"), lambda x: torch.tensor(x).to_sparse(),
    lambda x: torch.tensor(x, dtype=torch.complex64), lambda x: [torch.tensor(v) for v in x],
    lambda x: [torch.tensor([v, v]) for v in x], lambda x: [Decimal(v) for v in x],
    lambda x: [True] * len(x), lambda x: [object()] * len(x), lambda x: object(), lambda x: count,
    lambda x: [{"score": v} for v in x], lambda x: b"\1\2", lambda x: range(len(x)),
    lambda x: dict(enumerate(x)), lambda x: [v - 1e14 for v in x], lambda x: [-0.0] * len(x),
    lambda x: [1e-320] * len(x), lambda x: [1e15, -1e15] * len(x), lambda x: _async([], []),
)  # fmt: skip
count = 3
ERRORS = (OwnError("mine"), ValueError("mine"), KeyError("mine"), StopIteration(), TypeError(),
          IndexError("\n\nmine"), AssertionError(), MemoryError(), RecursionError("mine"),
          OSError(28, "mine"), TimeoutError(), UnicodeDecodeError("utf-8", b"x", 0, 1, "mine"),
          SystemExit(3), asyncio.CancelledError())  # fmt: skip
SHAPES: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda ids: torch.zeros(len(ids)), lambda ids: torch.zeros(len(ids), 1),
    lambda ids: torch.zeros(ids.shape), lambda ids: torch.zeros(*ids.shape, 1),
    lambda ids: torch.zeros(len(ids) + 1), lambda ids: torch.zeros(len(ids), 3), lambda ids: None,
    lambda ids: torch.zeros(()), lambda ids: (torch.zeros(len(ids)),), lambda ids: (), len,
    lambda ids: torch.full((len(ids),), NAN), lambda ids: torch.zeros(len(ids), dtype=torch.long),
    lambda ids: {"logits": torch.zeros(len(ids), 1)}, lambda ids: ids[0, 10_000],
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None, 3, "no/such/folder", "", [], {}, object(), nn.Linear, lambda: [1.0], lambda p: [1.0],
    lambda p, c, answer: [1.0] * len(c), lambda p, c, **columns: [1.0] * len(c), print, len,
    lambda *args, **kwargs: [1.0] * 9, lambda p, c, *, answer=1: [0.5] * len(c), nn.Identity(),
    nn.Linear(2, 1), [count_letters, count_letters], {"a": count_letters, "b": _async}, {"": len},
    {3: count_letters}, [count_letters, None], {"a/b": count_letters}, [[count_letters]], b"x",
)  # fmt: skip


def reward(draw: random.Random) -> Any:
    """Return a reward: every second one returns, raises or is something strange."""
    if draw.random() < 0.5:
        return count_letters
    kind = draw.choice(("made", "made", "error", "module", "other", "other", "others"))
    if kind == "made":
        return _returning(draw.choice(MADE))
    if kind == "error":
        return draw.choice((_raising(draw.choice(ERRORS)), _async_raising))
    if kind == "module":
        return _Module(draw.choice(SHAPES))
    return draw.choice(OTHERS) if kind == "other" else draw.choice((_async, _emptying))
