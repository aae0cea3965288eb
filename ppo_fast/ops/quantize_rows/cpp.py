"""Launcher of the C++ kernel, csrc/kernels/quantize_rows.hpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.ops.backends.cpp_launch import DTYPE_CODES
from ppo_fast.ops.backends.cpus import num_threads
from ppo_fast.ops.validation import HALF


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute numbers int8 [V, D] and scale float32 [V] of a CPU weight [V, D] of any strides."""
    from ppo_fast.ops import _C

    num_rows, num_inputs = weight.shape
    if weight.dtype not in (torch.float32, *HALF) or not weight.is_cpu:
        raise ValueError(f"weight: got {weight.dtype} on {weight.device}, expected floats on cpu")
    numbers = torch.empty((num_rows, num_inputs), dtype=torch.int8, device="cpu")
    scale = torch.empty(num_rows, dtype=torch.float32, device="cpu")
    _C.quantize_rows(
        dtype=DTYPE_CODES[weight.dtype],
        weight=weight.data_ptr(),
        numbers=numbers.data_ptr(),
        scales=scale.data_ptr(),
        num_rows=num_rows,
        num_inputs=num_inputs,
        row_stride=weight.stride(0),
        input_stride=weight.stride(1),
        num_threads=num_threads(),
    )
    return numbers, scale
