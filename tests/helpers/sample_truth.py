"""The draw by its definition, in Python's integers and floats, and rows of logits to draw from."""

from __future__ import annotations

import math

import pytest
import torch
from runnable import TRITON
from torch import Tensor

from ppo_fast.ops.sample_tokens import reference

INTERPRETED = TRITON and not torch.cuda.is_available()
many_draws = pytest.mark.skipif(INTERPRETED, reason="the interpreter takes 20 ms to draw once")


def draws(count: int) -> int:
    """Return the number of rows to draw from: fewer in the interpreter."""
    return min(count, 6) if INTERPRETED else count


def python_philox(counter, key):
    """Compute Philox 4x32-10 in Python's integers, round by round as in the paper."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high_0, low_0 = divmod(0xD2511F53 * c0, 2**32)
        high_1, low_1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def python_noise(seed: int, position: int, token: int) -> float:
    """Compute the noise g in float64, from the float32 v that the docstring of the op defines."""
    key = seed % 2**32, seed // 2**32 % 2**32
    r = python_philox((token // 4, position % 2**32, 0, 0), key)[token % 4]
    v = min(torch.tensor(max(r, 1)).float().item() * 2.0**-32, 1 - 2.0**-24)
    return -math.log(-math.log1p(-v))


def python_kept(scaled: list[float], top_k: int, top_p: float) -> list[int]:
    """Return the tokens that truncation keeps, by the definition."""
    ranked = sorted(range(len(scaled)), key=lambda j: (-scaled[j], j))
    ranked = ranked[: top_k or None]
    weights = [math.exp(scaled[j] - scaled[ranked[0]]) for j in ranked]
    mass = 0.0
    for n, weight in enumerate(weights, 1):
        mass += weight
        if top_p < 1 and mass / sum(weights) >= top_p:
            return ranked[:n]
    return ranked


def rows(count: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return seeds and positions of ``count`` rows."""
    return torch.arange(start, start + count), torch.full((count,), 7)


TRUNCATIONS = [
    {},
    {"top_k": 1},
    {"top_k": 30},  # fewer than there are blocks of 128 tokens
    {"top_k": 700},  # more
    {"top_k": 5002},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"top_k": 30, "top_p": 0.6},
    {"top_k": 700, "top_p": 0.95},
]


def logits_of(kind: str, b: int, v: int) -> Tensor:
    """Return logits on which the bounds exclude no tokens, some, or nearly all."""
    x = torch.randn(b, v)
    if kind == "flat":
        return torch.zeros(b, v)
    if kind == "peaked":
        return x.scatter(1, torch.randint(v, (b, 9)), 20 + torch.randn(b, 9))
    if kind == "peak in reach":  # as likely to be drawn as all the others together
        return (x / 10).scatter(1, torch.randint(v, (b, 1)), math.log(v))
    if kind == "rising":
        return (x * 3).sort(-1).values
    if kind == "falling":
        return (x * 3).sort(-1, descending=True).values
    if kind == "far from 0":
        return x * 3 - 10000
    if kind == "steps":  # ties, at the boundary of a truncation too
        return (x * 2).round()
    if kind == "holes":
        return (x * 3).masked_fill(torch.rand(b, v) < 0.9, -math.inf)
    return x * 3


KINDS = ["normal", "flat", "peaked", "peak in reach", "rising", "falling", "far from 0"]


def noisy(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float) -> Tensor:
    """Compute x / t + g of every token, without bounds."""
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    noise = reference.gumbel_noise(seeds, positions, logits.shape[1])
    return logits.to(work) / temperature + noise
