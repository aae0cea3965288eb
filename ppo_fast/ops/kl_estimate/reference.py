"""The specification of kl_estimate in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, *, mask: Tensor | None, estimator: str
) -> Tensor:
    """Compute the estimate [B, T] from two tensors and a bool mask [B, T]; formulas: see api.py."""
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    if estimator == "k1+k2":
        ref_logprobs = ref_logprobs.detach()
    d = logprobs.to(dtype) - ref_logprobs.to(dtype)
    if mask is not None:
        # Masked before the formulas, not after: a gradient of 0 times an inf would be NaN.
        d = torch.where(mask, d, 0)
    if estimator == "k1":
        return d
    if estimator == "abs":
        return d.abs()
    if estimator == "k3":
        return torch.expm1(-d) + d
    if estimator == "k3 clamped":
        d = torch.where(d.abs() > 20, d.detach().clamp(-20, 20), d)
        kl = torch.expm1(-d) + d
        return torch.where(kl > 10, 10, kl)
    k2 = 0.5 * d.square()
    return k2 if estimator == "k2" else d.detach() + (k2 - k2.detach())
