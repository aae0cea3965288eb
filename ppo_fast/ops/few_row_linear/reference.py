"""The specification of ``few_row_linear``, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ppo_fast.ops.gradient import without_autocast


def few_row_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None
) -> Tensor:
    """Compute ``x @ weight.T + bias``; on the CPU as the transposed product.

    A float32 x is rounded to the dtype of a half-precision weight; their product is float32. An
    int8 weight stands for ``weight * scale[:, None]``.
    """
    if scale is not None:
        weight = weight.to(x.dtype) * scale.to(x.dtype)[:, None]
    if x.dtype != weight.dtype:
        x, weight = x.to(weight.dtype).to(x.dtype), weight.to(x.dtype)
    with without_autocast(x.device):
        if x.device.type != "cpu":
            return F.linear(x, weight, bias)
        rows = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
        # The product is [V, n], for which the BLAS need not copy the weight; then n rows again.
        out = (weight @ rows.T).T.contiguous().view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias
