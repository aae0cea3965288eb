"""The specification of value_loss in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ppo_fast.ops.stats import VALUE_STATS, pack_stats


def value_loss(
    values: Tensor,
    *,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    clip: float | None,
    huber: float | None,
    normalizer: float | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute (loss [], metrics [K] as in VALUE_STATS) from tensors [B, T]; formula: see api.py."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    v = torch.where(mask, values.to(dtype), 0)
    returns = torch.where(mask, returns.detach().to(dtype), 0)
    worst = _twice_error(v - returns, huber)
    clipped = torch.zeros_like(mask)
    if clip is not None and old_values is not None:
        old = torch.where(mask, old_values.detach().to(dtype), 0)
        # Not old + clamp(v - old): within the range this is v to the bit, so that rounding alone
        # never makes the clipped error the larger one.
        near = _twice_error(torch.clamp(v, old - clip, old + clip) - returns, huber)
        clipped = near > worst
        worst = torch.where(clipped, near, worst)
    per_token = 0.5 * worst
    tokens = mask.sum()
    count = tokens if normalizer is None else normalizer
    if isinstance(count, Tensor):
        count = count.detach().masked_fill(count == 0, 1).to(per_token.dtype)
    return per_token.sum() / count, _metrics(v, returns, mask, per_token, clipped, tokens)


def _twice_error(error: Tensor, huber: float | None) -> Tensor:
    squared = error.square()
    if huber is None:
        return squared
    size = error.abs()
    return torch.where(size <= huber, squared, huber * (2 * size - huber))


@torch.no_grad()
def _metrics(
    v: Tensor, returns: Tensor, mask: Tensor, per_token: Tensor, clipped: Tensor, tokens: Tensor
) -> Tensor:
    residual = returns - v
    # One neutral element is added: torch has no minimum or maximum of an empty tensor.
    lowest = F.pad(torch.where(mask, v, math.inf).flatten(), (0, 1), value=math.inf).amin()
    highest = F.pad(torch.where(mask, v, -math.inf).flatten(), (0, 1), value=-math.inf).amax()
    return pack_stats(
        VALUE_STATS,
        {
            "tokens": tokens,
            "value_loss": per_token.sum(),
            "clipped": clipped.sum(),
            "values": v.sum(),
            "returns": returns.sum(),
            "returns_squared": returns.square().sum(),
            "residual": residual.sum(),
            "residual_squared": residual.square().sum(),
            "value_min": lowest,
            "value_max": highest,
        },
    )
