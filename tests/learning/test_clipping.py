"""Gradients are scaled down to the bound of their norm; within it they are not touched."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ppo_fast.learning.optimizers import clip_gradients

BOUND = 0.7


def weights_with_norm(norm: float, device: str = "cpu") -> list[torch.nn.Parameter]:
    """Return weights, some of them without gradients; the norm of all is ``norm`` to rounding."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.zeros(n, 3, device=device)) for n in (5, 1, 7)]
    for weight in weights[:2]:
        weight.grad = torch.randn(weight.shape, generator=generator).to(device)
    size = get_total_norm([w.grad for w in weights[:2]])
    for weight in weights[:2]:
        weight.grad = weight.grad * (norm / size)
    return weights


@pytest.mark.parametrize("bound", [BOUND, math.inf])
@pytest.mark.parametrize(
    "norm", [0.0, 1e-30, 0.3, BOUND - 2e-6, BOUND - 5e-7, BOUND, BOUND + 1e-6, 3.0, 1e30]
)
def test_the_bits_are_those_of_torch(norm, bound):
    ours, theirs = weights_with_norm(norm), weights_with_norm(norm)
    size = get_total_norm([w.grad for w in ours if w.grad is not None])
    clip_gradients(ours, bound, size)
    clip_grads_with_norm_(theirs, bound, size)
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0, equal_nan=True)
    assert ours[2].grad is None


@pytest.mark.parametrize(
    ("norm", "bound", "scaled"),
    [(0.3, BOUND, False), (0.3, math.inf, False), (0.9, BOUND, True), (0.9, 1.0, False)],
)
def test_gradients_are_multiplied_only_above_the_bound(norm, bound, scaled):
    weights = weights_with_norm(norm)
    before = [w.grad._version for w in weights[:2]]
    clip_gradients(weights, bound, get_total_norm([w.grad for w in weights[:2]]))
    assert [w.grad._version > v for w, v in zip(weights[:2], before, strict=True)] == [scaled] * 2


def test_a_norm_on_a_device_is_not_read():
    """Reading one of the meta device would raise."""
    weights = weights_with_norm(0.3, "meta")
    before = weights[0].grad._version
    clip_gradients(weights, BOUND, get_total_norm([w.grad for w in weights[:2]]))
    assert weights[0].grad._version > before
