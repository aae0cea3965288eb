"""Metrics of the losses: a float32 device tensor [K] of sums, minima and maxima for each call.

A layout names the K entries in order and says how each of them merges, so that microbatches and
ranks merge without a host sync. A reader then turns the merged tensor into plain floats with one
host copy. Counts are float32 too: exact up to 2^24 tokens a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["sum", "min", "max"]

LARGEST = torch.finfo(torch.float32).max

# Sums and extrema over the valid tokens of one ppo_loss call; r = exp(logprobs - old_logprobs).
PPO_STATS: dict[str, Reduction] = {
    "tokens": "sum",
    "policy_loss": "sum",  # before aggregation and normalizer
    "kl_loss": "sum",  # the loss estimator to the reference policy, without its coefficient
    "ref_kl": "sum",  # k1 to the reference policy
    "entropy": "sum",
    "approx_kl": "sum",  # k1 of KL(old || new): old - new
    "approx_kl_k3": "sum",  # k3 of the same: r - 1 - log r
    "clipped_high": "sum",  # A > 0 and r > 1 + high
    "clipped_low": "sum",  # A < 0 and r < 1 - low
    "dual_clipped": "sum",  # A < 0 and r > dual_clip
    "ratio": "sum",
    "ratio_min": "min",
    "ratio_max": "max",
    "max_log_ratio": "max",  # of |log r|
}

# Sums and extrema over the valid tokens of one value_loss call; the residual is R - v.
VALUE_STATS: dict[str, Reduction] = {
    "tokens": "sum",
    "value_loss": "sum",  # before the normalizer
    "clipped": "sum",  # the clipped error is the larger one
    "values": "sum",
    "returns": "sum",
    "returns_squared": "sum",
    "residual": "sum",
    "residual_squared": "sum",
    "value_min": "min",
    "value_max": "max",
}


def pack_stats(layout: Mapping[str, Reduction], stats: Mapping[str, Tensor]) -> Tensor:
    """Stack the 0-dim tensors ``stats`` in the order of ``layout``: float32 [K], detached."""
    return torch.stack([stats[name].detach().float() for name in layout])


def merge_stats(layout: Mapping[str, Reduction], stats: Sequence[Tensor]) -> Tensor:
    """Merge the metrics of several calls (microbatches, ranks) into those of all their tokens.

    Args:
        layout: PPO_STATS or VALUE_STATS.
        stats: at least one tensor [K], K = len(layout), all on one device.

    Returns the merged tensor [K], of the same dtype and device; no host sync.
    Raises ValueError when ``stats`` is empty or a shape is not [K].
    """
    shapes = [list(x.shape) for x in stats]
    if not shapes or any(shape != [len(layout)] for shape in shapes):
        raise ValueError(f"merge_stats: expected tensors of shape [{len(layout)}], got {shapes}")
    stacked = torch.stack(list(stats))
    merge: dict[Reduction, Callable[..., Tensor]] = {
        "sum": torch.sum,
        "min": torch.amin,
        "max": torch.amax,
    }
    parts, start = [], 0
    for reduction, names in groupby(layout.values()):
        end = start + len(list(names))
        parts.append(merge[reduction](stacked[:, start:end], dim=0))
        start = end
    return torch.cat(parts)


def ppo_metrics(stats: Tensor) -> dict[str, float]:
    """Return the means over tokens of (merged) ppo_loss metrics, with one host copy.

    Keys: tokens (their number), policy_loss, kl_loss, ref_kl, entropy, approx_kl, approx_kl_k3
    (sums over tokens divided by that), clip_fraction (of both sides), clip_fraction_high,
    clip_fraction_low, dual_clip_fraction, ratio_mean, ratio_min, ratio_max, max_log_ratio. The
    first minibatch of a step has max_log_ratio 0 up to rounding. Without a valid token every value
    is 0.0.
    Raises ValueError when ``stats`` is not [K] in the layout PPO_STATS.
    """
    total = _read("ppo_metrics", PPO_STATS, stats)
    n = max(total["tokens"], 1.0)
    return {
        "tokens": total["tokens"],
        "policy_loss": total["policy_loss"] / n,
        "kl_loss": total["kl_loss"] / n,
        "ref_kl": total["ref_kl"] / n,
        "entropy": total["entropy"] / n,
        "approx_kl": total["approx_kl"] / n,
        "approx_kl_k3": total["approx_kl_k3"] / n,
        "clip_fraction": (total["clipped_high"] + total["clipped_low"]) / n,
        "clip_fraction_high": total["clipped_high"] / n,
        "clip_fraction_low": total["clipped_low"] / n,
        "dual_clip_fraction": total["dual_clipped"] / n,
        "ratio_mean": total["ratio"] / n,
        "ratio_min": total["ratio_min"],
        "ratio_max": total["ratio_max"],
        "max_log_ratio": total["max_log_ratio"],
    }


def value_metrics(stats: Tensor) -> dict[str, float]:
    """Return the means over tokens of (merged) value_loss metrics, with one host copy.

    Keys: value_loss, value_clip_fraction, value_mean, return_mean, explained_variance
    (1 - Var[R - v] / Var[R]), value_min, value_max. Without a valid token every value is 0.0, and
    so is explained_variance where the returns do not vary by more than float32 sums can resolve
    (Var[R] <= 1e-6 E[R^2]).
    Raises ValueError when ``stats`` is not [K] in the layout VALUE_STATS.
    """
    total = _read("value_metrics", VALUE_STATS, stats)
    n = max(total["tokens"], 1.0)
    return {
        "value_loss": total["value_loss"] / n,
        "value_clip_fraction": total["clipped"] / n,
        "value_mean": total["values"] / n,
        "return_mean": total["returns"] / n,
        "explained_variance": _explained_variance(total, n),
        "value_min": total["value_min"],
        "value_max": total["value_max"],
    }


def _explained_variance(total: dict[str, float], n: float) -> float:
    second_moment = total["returns_squared"] / n
    variance = second_moment - (total["returns"] / n) ** 2
    if variance <= 1e-6 * second_moment:
        return 0.0
    return 1 - (total["residual_squared"] / n - (total["residual"] / n) ** 2) / variance


def _read(reader: str, layout: Mapping[str, Reduction], stats: Tensor) -> dict[str, float]:
    if list(stats.shape) != [len(layout)]:
        raise ValueError(f"{reader}: got shape {list(stats.shape)}, expected [{len(layout)}]")
    # an infinite sum (of ratios that overflowed) is a number in the log: JSON has no infinity
    numbers = [min(max(x, -LARGEST), LARGEST) if x == x else x for x in stats.tolist()]
    total = dict(zip(layout, numbers, strict=True))
    return total if total["tokens"] else dict.fromkeys(layout, 0.0)
