"""The specification of whiten in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def whiten(values: Tensor, *, mask: Tensor) -> Tensor:
    """Formula: see api.py. Tensor [B, T] and a bool mask [B, T] -> [B, T]."""
    x = torch.where(mask, values.to(torch.promote_types(values.dtype, torch.float32)), 0)
    n = mask.sum()
    centred = torch.where(mask, x - x.sum() / n.clamp(min=1), 0)
    # Once more for the rounding of the mean, which would be the whole signal of equal large values.
    centred = torch.where(mask, centred - centred.sum() / n.clamp(min=1), 0)
    variance = centred.square().sum() / (n - 1).clamp(min=1)
    return centred * torch.rsqrt(variance + 1e-8)
