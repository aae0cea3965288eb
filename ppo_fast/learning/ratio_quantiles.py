"""Quantiles of the ratios of new to old probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

QUANTILES = {"ratio_p01": 0.01, "ratio_p50": 0.5, "ratio_p99": 0.99}
LARGEST = 88.0  # exp of it is a float32, as the other metrics of ratios are


def ratio_quantiles(log_ratios: Sequence[Tensor], masks: Sequence[Tensor]) -> dict[str, float]:
    """Return quantiles of π / π_old over tokens, with linear interpolation.

    The device is waited for once, to copy a few numbers. ``torch.quantile`` takes no more than
    16 million numbers; this takes any.

    Args:
        log_ratios: of microbatches, [b, T] each, detached: log π - log π_old of each token.
        masks: bool of the same shapes and device: which tokens count.

    Returns:
        ratio_p01, ratio_p50 and ratio_p99; empty if no token counts.
    """
    if not log_ratios:
        return {}
    pairs = zip(log_ratios, masks, strict=True)
    flat = torch.cat([x.float().masked_fill(~mask, math.inf).flatten() for x, mask in pairs])
    if not flat.numel():
        return {}
    count = torch.stack([mask.sum() for mask in masks]).sum()
    ordered = flat.sort().values
    shares = torch.tensor(list(QUANTILES.values()), dtype=torch.float64, device="cpu")
    places = shares.to(flat.device) * (count - 1).clamp_min(0)
    around = torch.cat([places.floor(), places.ceil()]).long()
    numbers = torch.cat([count.double()[None], places, ordered[around].double()]).tolist()
    if numbers[0] == 0:
        return {}
    k = len(QUANTILES)
    found = {}
    for i, name in enumerate(QUANTILES):
        place, below, above = (numbers[1 + i + j * k] for j in range(3))
        low, high = (math.exp(min(x, LARGEST)) for x in (below, above))
        found[name] = low + (high - low) * (place - math.floor(place))
    return found
