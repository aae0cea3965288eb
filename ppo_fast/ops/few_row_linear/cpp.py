"""Launcher of the C++ kernel, csrc/kernels/few_row_linear.hpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.ops.backends.cpp_launch import DTYPE_CODES, address, vouched, vouched_or_none
from ppo_fast.ops.backends.cpus import num_threads
from ppo_fast.ops.validation import HALF


def few_row_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None
) -> Tensor:
    """Compute [..., V] from x [..., D], weight [V, D] and bias [V], CPU tensors.

    They are of one dtype; the weight may be in half precision where the others are float32, or in
    int8 with a float32 ``scale`` [V].
    """
    from ppo_fast.ops import _C

    dtype, (num_outputs, num_inputs) = x.dtype, weight.shape
    x = vouched("x", x, (*x.shape[:-1], num_inputs), dtype)
    stored = (*HALF, torch.int8) if scale is not None else HALF
    weight_dtype = weight.dtype if dtype == torch.float32 and weight.dtype in stored else dtype
    if weight.stride(1) != 1 or not weight.is_cpu or weight.dtype != weight_dtype:
        weight = vouched("weight", weight, (num_outputs, num_inputs), weight_dtype)
    bias = vouched_or_none("bias", bias, (num_outputs,), dtype)
    scale = vouched_or_none("scale", scale, (num_outputs,), torch.float32)
    y = torch.empty((*x.shape[:-1], num_outputs), dtype=dtype, device="cpu")
    _C.few_row_linear(
        dtype=DTYPE_CODES[dtype],
        weight_dtype=DTYPE_CODES[weight_dtype],
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=address(bias),
        scales=address(scale),
        y=y.data_ptr(),
        num_rows=y.shape[:-1].numel(),
        num_inputs=num_inputs,
        num_outputs=num_outputs,
        weight_stride=weight.stride(0),
        num_threads=num_threads(),
    )
    return y
