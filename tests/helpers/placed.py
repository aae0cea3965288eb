"""Tensors at chosen memory addresses (next to protected pages, or with large strides), and chosen
contents of newly allocated tensors."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PAGE = mmap.PAGESIZE
_PROT_NONE = 0
_MAP_NORESERVE = 0x4000  # Linux: pages take memory when they are written
_libc = ctypes.CDLL(None, use_errno=True)

_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}


def guarded(tensor: Tensor, *, at_end: bool) -> Tensor:
    """Return a copy with the same strides that ends at a protected page, or starts after one.

    An access to the byte after it, or before it, ends the process.
    """
    if tensor.numel() == 0:
        return tensor
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    num_bytes = -(-span * tensor.element_size() // PAGE) * PAGE
    memory = mmap.mmap(-1, num_bytes + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + PAGE + num_bytes):
        if _libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    pages = torch.frombuffer(memory, dtype=torch.uint8, offset=PAGE, count=num_bytes)
    elements = pages.view(tensor.dtype)
    offset = elements.numel() - span if at_end else 0
    return elements.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)


def far_apart(tensor: Tensor, row_stride: int) -> Tensor:
    """Return a copy of [N, V] with this row stride, in more virtual memory than the machine has."""
    return spread(tensor, (row_stride, 1))


def spread(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return a copy with these strides, in more virtual memory than the machine has."""
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = mmap.mmap(-1, span * tensor.element_size(), flags=flags)
    elements = torch.frombuffer(memory, dtype=tensor.dtype)
    return elements.as_strided(tensor.shape, strides).copy_(tensor)


def filled(tensor: Tensor, number: float) -> Tensor:
    """Fill a float tensor with ``number``, others with a value that tells NaN from a number."""
    if tensor.is_floating_point():
        return tensor.fill_(number)
    is_nan = math.isnan(number)
    if tensor.dtype == torch.bool:
        return tensor.fill_(is_nan)
    return tensor.fill_(torch.iinfo(tensor.dtype).max - is_nan)


class Allocations(TorchDispatchMode):
    """Within the block, ``place`` replaces every tensor that is allocated without values."""

    def __init__(self, place: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.place = place

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return self.place(result) if func in _EMPTY else result
