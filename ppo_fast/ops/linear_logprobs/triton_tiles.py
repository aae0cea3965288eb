"""Tiles of an LM head's vocabulary on the GPU: their sizes, their memory, their BLAS products."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

# Columns of a tile. Each tile reads and writes the gradient of hidden, N * D, once: with 4096
# columns that takes a quarter of the time of the product that adds to it (H100), and where D is
# 4096 a tile is no larger than that gradient. Fewer rows leave room for more columns. Multiples of
# 128, by which the BLAS divides its work.
_TILE_BYTES, _MIN_COLUMNS, _COLUMN_STEP = 2**28, 4096, 128

# Each row of a tile starts on a multiple of so many columns: 16 bytes in half precision.
VEC = 8


class Head(NamedTuple):
    """An LM head that is read a tile at a time."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # float32 [V] and up to VEC - 1 more
    operands: torch.dtype  # of the products

    def rows(self, tile: Tile) -> Tensor:
        """Return the weight of a tile, [width, D]."""
        return self.weight[tile.first : tile.first + tile.width].to(self.operands)

    def bias_of(self, tile: Tile) -> Tensor | None:
        return None if self.bias is None else self.bias[tile.first :]


class Tile(NamedTuple):
    first: int
    """The token of the first column."""
    width: int
    kept: Tensor | None
    """float32 [N, width], where the products stay for the backward; None: they do not."""


class Scratch:
    """Memory for a tile of N rows, allocated at first use and then reused."""

    def __init__(self, num_rows: int, columns: int, dtype: torch.dtype, like: Tensor) -> None:
        self.num_rows, self.count = num_rows, num_rows * pitch_of(columns)
        self.dtype, self.device = dtype, like.device
        self.memory: Tensor | None = None

    def tile(self, width: int) -> Tensor:
        if self.memory is None:
            self.memory = torch.empty(self.count, dtype=self.dtype, device=self.device)
        pitch = pitch_of(width)
        return self.memory[: self.num_rows * pitch].view(self.num_rows, pitch)[:, :width]


def head_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
    is_half = hidden.dtype == weight.dtype and weight.dtype.itemsize == 2
    if bias is not None:
        bias = F.pad(bias.float(), (0, -len(bias) % VEC))
    return Head(weight, bias, weight.dtype if is_half else torch.float32)


def columns_of(num_rows: int, head: Head) -> int:
    """Return the columns of a full tile."""
    vocab_size, hidden_size = head.weight.shape
    # A slice of the weight that must be converted takes room as well.
    converted = hidden_size if head.weight.dtype != head.operands else 1
    columns = max(_TILE_BYTES // (4 * max(num_rows, converted)), _MIN_COLUMNS)
    return min(triton.cdiv(columns, _COLUMN_STEP) * _COLUMN_STEP, vocab_size)


def pitch_of(width: int) -> int:
    return triton.cdiv(width, VEC) * VEC


def tiles_of(num_rows: int, vocab_size: int, columns: int, kept: Tensor) -> Iterator[Tile]:
    """Yield the tiles of a vocabulary; those that ``kept`` [K] has room for stay there.

    The columns after the last multiple of VEC are a tile of their own: no other needs padding.
    """
    whole = vocab_size // VEC * VEC
    for first, end in pairwise(sorted({*range(0, whole, columns), whole, vocab_size})):
        place = None
        if end <= whole and num_rows * end <= kept.numel():
            place = kept[num_rows * first : num_rows * end].view(num_rows, end - first)
        yield Tile(first, end - first, place)


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write left @ right to ``out``, summed in float32 and rounded to its dtype once.

    With a half precision output the BLAS may round parts of a sum
    (allow_bf16_reduced_precision_reduction). Autocast does not change products with a given output.
    """
    product = out
    if out.dtype != torch.float32:
        product = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    if left.is_cuda and left.dtype != torch.float32:
        torch.mm(left, right, out_dtype=torch.float32, out=product)
    else:
        torch.mm(left.float(), right.float(), out=product)
    if product is not out:
        out.copy_(product)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to ``total``, in float32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda and _adds_half_products(left.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        product = torch.empty_like(total)
        multiply(left, right, product)
        total.add_(product)


@cache
def _adds_half_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether addmm adds products of half precision operands to a float32 tensor.

    Early versions refuse: https://github.com/pytorch/pytorch/issues/154086.
    """
    total, half = torch.zeros(8, 8, device=device), torch.zeros(8, 8, device=device, dtype=dtype)
    try:
        torch.addmm(total, half, half, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
