"""The specification of whiten in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def whiten(values: Tensor, *, mask: Tensor) -> Tensor:
    """Whiten a tensor [B, T] under a bool mask [B, T]; formula: see api.py."""
    x = torch.where(mask, values.to(torch.promote_types(values.dtype, torch.float32)), 0)
    n = mask.sum()
    centred = torch.where(mask, x - x.sum() / n.clamp(min=1), 0)
    # Centred again, since of equal large values only the rounding error of the mean would remain.
    centred = torch.where(mask, centred - centred.sum() / n.clamp(min=1), 0)
    variance = centred.square().sum() / (n - 1).clamp(min=1)
    return centred * torch.rsqrt(variance + 1e-8)
