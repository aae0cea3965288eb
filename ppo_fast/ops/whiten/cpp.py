"""Launchers of the C++ kernels, csrc/kernels/whiten.hpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.ops.backends.cpp_launch import DTYPE_CODES, address, vouched
from ppo_fast.ops.backends.cpus import num_threads


def whiten(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the whitened values [B, T] and the scale [], float64, that backward needs.

    Values are CPU tensors [B, T], float32 or float64; the mask is bool.
    """
    from ppo_fast.ops import _C

    dtype, shape = values.dtype, tuple(values.shape)
    values = vouched("values", values, shape, dtype)
    mask = vouched("mask", mask, shape, torch.bool)
    whitened = torch.empty(shape, dtype=dtype, device="cpu")
    scale = torch.empty((), dtype=torch.float64, device="cpu")
    _C.whiten(
        dtype=DTYPE_CODES[dtype],
        values=address(values),
        mask=address(mask),
        whitened=address(whitened),
        scale=address(scale),
        num_rows=shape[0],
        num_steps=shape[1],
        num_threads=num_threads(),
    )
    return whitened, scale


def whiten_backward(grad_whitened: Tensor, whitened: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    """Compute the gradient of the values, [B, T]."""
    from ppo_fast.ops import _C

    dtype, shape = whitened.dtype, tuple(whitened.shape)
    grad_whitened = vouched("grad_whitened", grad_whitened, shape, dtype)
    whitened = vouched("whitened", whitened, shape, dtype)
    mask = vouched("mask", mask, shape, torch.bool)
    scale = vouched("scale", scale, (), torch.float64)
    grad_values = torch.empty(shape, dtype=dtype, device="cpu")
    _C.whiten_backward(
        dtype=DTYPE_CODES[dtype],
        grad_whitened=address(grad_whitened),
        whitened=address(whitened),
        mask=address(mask),
        scale=address(scale),
        grad_values=address(grad_values),
        num_rows=shape[0],
        num_steps=shape[1],
        num_threads=num_threads(),
    )
    return grad_values
