"""Batches for the tests of value_loss, and its formula token by token in float64."""

from __future__ import annotations

import math

import pytest
import torch
from runnable import WIDE, generator, implementations

from ppo_fast.ops.stats import VALUE_STATS
from ppo_fast.ops.value_loss import value_loss

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}

each_impl = pytest.mark.parametrize("impl", implementations("value_loss"))
each_clip = pytest.mark.parametrize("clip", [None, 0.4])
each_huber = pytest.mark.parametrize("huber", [None, 0.7])


def batch(seed=0, B=3, T=5, dtype=WIDE, valid=0.7):
    g = generator(seed)
    x = torch.randn(3, B, T, generator=g, dtype=torch.float64).to(dtype)
    tensors = {
        "values": x[0].clone().requires_grad_(),
        "old_values": (x[0] + x[1]).clone(),
        "returns": x[2].clone(),
        "mask": torch.rand(B, T, generator=g) < valid,
    }
    return tensors, torch.randn((), generator=g).item()


def half_square(error, huber):
    """Return 1/2 e^2, or Huber's (1964) continuation by a line, and its derivative."""
    size = min(abs(error), math.inf if huber is None else huber)
    return size * (abs(error) - size / 2), math.copysign(size, error)


def truth(values, old_values, returns, mask, clip, normalizer, huber=None):
    """Compute (loss, gradient, stats) by the formula, token by token."""
    gradient = torch.zeros(values.shape, dtype=torch.float64)
    stats = {"sum": 0.0, "min": math.inf, "max": -math.inf}
    stats = {name: stats[reduction] for name, reduction in VALUE_STATS.items()}
    normalizer = normalizer or max(int(mask.sum()), 1)
    for b, t in mask.nonzero().tolist():
        v, old, ret = (x[b, t].item() for x in (values, old_values, returns))
        error, slope = half_square(v - ret, huber)
        if clip is not None:
            v_clipped = old + min(max(v - old, -clip), clip)
            if abs(v - old) > clip and half_square(v_clipped - ret, huber)[0] > error:
                error, slope = half_square(v_clipped - ret, huber)[0], 0.0
                stats["clipped"] += 1
        gradient[b, t] = slope / normalizer
        stats["tokens"] += 1
        stats["value_loss"] += error
        stats["values"] += v
        stats["returns"] += ret
        stats["returns_squared"] += ret**2
        stats["residual"] += ret - v
        stats["residual_squared"] += (ret - v) ** 2
        stats["value_min"] = min(stats["value_min"], v)
        stats["value_max"] = max(stats["value_max"], v)
    return stats["value_loss"] / normalizer, gradient, [stats[name] for name in VALUE_STATS]


def run_all(tensors, **options):
    """Return loss, metrics and gradient of one call."""
    values = tensors["values"].detach().requires_grad_()
    out = value_loss(**{**tensors, "values": values}, **options)
    return out.loss.detach(), out.metrics, torch.autograd.grad(-1.7 * out.loss, values)[0]
