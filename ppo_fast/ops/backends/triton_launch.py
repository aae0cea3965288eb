"""Shared code of the Triton kernels: compiling, launching, reading a row.

Scalars of a kernel are annotated (tl.int64, tl.float32) and never specialised on: a length, a
temperature or a coefficient that changes compiles nothing anew. Constexprs come from the launch
tables and a few flags. All address arithmetic is int64.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Launch(NamedTuple):
    """An entry of a launch table: how a kernel is launched, and what its code may use.

    tests/ops/test_compiled.py checks the budgets on compiled code.
    """

    block: int
    """Elements that a program takes at once."""
    num_warps: int
    registers: int
    """The most that a thread may use, on every architecture."""
    num_stages: int = 1
    """How many blocks a loop with products loads or multiplies at a time."""


def kernel(fn: Any) -> Any:
    """Apply ``triton.jit`` without specialising on scalars, which ``fn`` has to annotate."""
    scalars = [
        name
        for name, parameter in inspect.signature(fn).parameters.items()
        if parameter.annotation in ("tl.int64", "tl.float32")  # strings, by the __future__ import
    ]
    return triton.jit(do_not_specialize=scalars)(fn)


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def launch(
    fn: Any, num_programs: int, how: Launch, device: torch.device, *arguments: Any, **constants: Any
) -> None:
    """Launch ``num_programs`` programs of ``fn`` on the current stream of ``device``; none for 0.

    The grid has one dimension: the others end at 65,535.
    """
    if num_programs == 0:
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        fn[(num_programs,)](
            *arguments,
            **constants,
            BLOCK=how.block,
            num_warps=how.num_warps,
            num_stages=how.num_stages,
            enable_fp_fusion=True,  # its default differs between versions
        )


class Rows(NamedTuple):
    """The layout in which a kernel reads [..., V].

    Row i starts (i // inner) * outer_stride + (i % inner) * inner_stride + offset elements after
    ``start``, which lies on a multiple of 16 bytes.
    """

    start: Tensor
    offset: int
    outer_stride: int
    inner: int
    inner_stride: int

    def in_phase(self, num_rows: int, length: int) -> bool:
        """Return whether rows are aligned as those of a contiguous [num_rows, length].

        That is, whether each row starts as far from a multiple of 16 bytes as the same row of a
        contiguous tensor that starts on such a multiple.
        """
        vec = 16 // self.start.element_size()
        steps = [(self.offset, 0)]
        if self.inner > 1:
            steps.append((self.inner_stride, length))
        if num_rows > self.inner:
            steps.append((self.outer_stride, self.inner * length))
        return all((ours - theirs) % vec == 0 for ours, theirs in steps)


def aligned(tensor: Tensor) -> tuple[Tensor, int]:
    """Return a view that starts on a multiple of 16 bytes, and the offset of ``tensor`` from it.

    The multiple is the last one at or before ``tensor``; the offset is in elements.
    """
    offset = tensor.data_ptr() % 16 // tensor.element_size()
    if offset == 0:
        return tensor, 0
    return tensor.as_strided((1,), (1,), tensor.storage_offset() - offset), offset


@triton.jit
def row_offset(row, offset, outer_stride, inner, inner_stride):
    """Where a row of Rows starts; int64. A row's number fits 32 bits, as a grid does, and dividing
    those takes a few instructions where 64 bits take a hundred."""
    number, per_outer = row.to(tl.int32), inner.to(tl.int32)
    outer = (number // per_outer).to(tl.int64)
    return offset + outer * outer_stride + (number % per_outer).to(tl.int64) * inner_stride


@triton.jit
def split_row(start, length, VEC: tl.constexpr):
    """A row that starts anywhere, as a head of less than VEC elements, a body of whole 16 bytes,
    and a tail: (length of the head, where the body starts, its length). The compiler sees that the
    last two are multiples of VEC, and loads 16 bytes at once."""
    body = (start + VEC - 1) // VEC * VEC
    head = tl.minimum(body - start, length)
    return head, body, (length - head) // VEC * VEC


@triton.jit
def edge_columns(head, body_length, length, VEC: tl.constexpr):
    """Columns of head and tail, 2 * VEC of them, and which of those exist."""
    lane = tl.arange(0, 2 * VEC)
    column = tl.where(lane < VEC, lane, head + body_length + lane - VEC)
    return column, tl.where(lane < VEC, lane < head, column < length)
