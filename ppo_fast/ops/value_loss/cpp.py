"""Launcher of the C++ kernel, csrc/kernels/value_loss.hpp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppo_fast.ops.backends.cpp_launch import DTYPE_CODES, address, vouched
from ppo_fast.ops.backends.cpus import num_threads
from ppo_fast.ops.stats import VALUE_STATS


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    clip: float | None,
    huber: float | None,
    normalizer: float | Tensor | None,
    num_gradients: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute loss [], metrics [K] and gradients [num_gradients, B, T] on the CPU.

    ``num_gradients`` is 0 (none) or 1 (of the values). Tensors are [B, T] of one dtype, float32 or
    float64; the mask is bool.
    """
    from ppo_fast.ops import _C

    dtype, shape = values.dtype, tuple(values.shape)
    values = vouched("values", values, shape, dtype)
    returns = vouched("returns", returns, shape, dtype)
    mask = vouched("mask", mask, shape, torch.bool)
    if clip is None or old_values is None:
        clip, old_values = math.inf, values
    old_values = vouched("old_values", old_values, shape, dtype)
    loss = torch.empty((), dtype=dtype, device="cpu")
    stats = torch.empty(len(VALUE_STATS), dtype=torch.float32, device="cpu")
    gradients = torch.empty(num_gradients, *shape, dtype=dtype, device="cpu")
    _C.value_loss(
        dtype=DTYPE_CODES[dtype],
        values=address(values),
        old_values=address(old_values),
        returns=address(returns),
        mask=address(mask),
        clip=clip,
        huber=math.inf if huber is None else huber,
        # A normalizer of 0 counts as 1; to the kernel 0 means "count the tokens".
        normalizer=0.0 if normalizer is None else float(normalizer) or 1.0,
        loss=address(loss),
        stats=address(stats),
        grad_values=address(gradients) if num_gradients > 0 else 0,
        num_rows=shape[0],
        num_steps=shape[1],
        num_threads=num_threads(),
    )
    return loss, stats, gradients
