"""What the launchers share: how a tensor is handed over.

A C++ kernel gets addresses, since a call costs 5 us so and 14 us with numpy arrays. It trusts them:
the launchers, not their callers, vouch for shapes, dtypes, devices and layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

# In the order of enum class Dtype in csrc/base/dtype.hpp.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def vouched(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``tensor``, contiguous. Bind it to a name: a copy must outlive the kernel's call.

    Raises ValueError unless it has this shape and dtype and is on the CPU.
    """
    if tensor.shape == shape and tensor.dtype == dtype and tensor.is_cpu:
        return tensor if tensor.is_contiguous() else tensor.contiguous()
    got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
    raise ValueError(f"{name}: got {got}, expected {dtype} {shape} on cpu")


def vouched_or_none(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor | None:
    """The same for a tensor that may be missing."""
    return None if tensor is None else vouched(name, tensor, shape, dtype)


def address(tensor: Tensor | None) -> int:
    """Where the elements start; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``torch.empty`` on the CPU, in large pages where it is large."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    if tensor.nbytes >= 2**22:
        from ppo_fast.ops import _C

        _C.prefer_huge_pages(start=tensor.data_ptr(), num_bytes=tensor.nbytes)
    return tensor


def merged_strides(logits: Tensor) -> tuple[list[int], list[int]]:
    """Sizes and strides of the leading dimensions, with neighbours merged where one stride will
    do."""
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == size * stride:
            sizes[-1], strides[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            strides.append(stride)
    return sizes, strides
