"""Shared code of the launchers of C++ kernels: it passes tensors as addresses.

A C++ kernel gets addresses, which cost a call less than numpy arrays. It does not check them: the
launchers, not their callers, vouch for shapes, dtypes, devices and layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

# In the order of enum class Dtype in csrc/base/dtype.hpp.
DTYPE_CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int8: 4,
}


def vouched(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return ``tensor``, contiguous. Bind it to a name: a copy must outlive the kernel's call.

    Raises ValueError unless it has this shape and dtype and is on the CPU.
    """
    if tensor.shape == shape and tensor.dtype == dtype and tensor.is_cpu:
        return tensor if tensor.is_contiguous() else tensor.contiguous()
    got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
    raise ValueError(f"{name}: got {got}, expected {dtype} {shape} on cpu")


def vouched_or_none(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor | None:
    """Return ``vouched`` of the tensor, or None for None."""
    return None if tensor is None else vouched(name, tensor, shape, dtype)


def written(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return ``tensor``, which a kernel writes to, as it is.

    Raises ValueError where ``vouched`` does, and where a copy would be written in its place.
    """
    if vouched(name, tensor, shape, dtype) is tensor:
        return tensor
    raise ValueError(f"{name}: got strides {tensor.stride()}, expected a contiguous tensor")


def address(tensor: Tensor | None) -> int:
    """Return the address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return ``torch.empty`` on the CPU, in large pages from 4 MiB on."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    if tensor.nbytes >= 2**22:
        from ppo_fast.ops import _C

        _C.prefer_huge_pages(start=tensor.data_ptr(), num_bytes=tensor.nbytes)
    return tensor


def merged_strides(logits: Tensor) -> tuple[list[int], list[int]]:
    """Return sizes and strides of all dimensions but the last, merged where one stride will do."""
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
