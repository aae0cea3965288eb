"""An LM head on the GPU, a tile of the vocabulary at a time: which tiles, their room, and products
by the BLAS in float32."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

# Columns of a tile. The gradient of hidden, N * D, is read and written once a tile: with 4096
# columns that takes a quarter of the time of the product that it is added in (H100), and a tile is
# no larger than that gradient is where D is 4096. Fewer rows leave room for more columns. Whole
# multiples of 128, which the BLAS divides its work by.
_TILE_BYTES, _MIN_COLUMNS, _COLUMN_STEP = 2**28, 4096, 128

# Columns that fill 16 bytes, of half precision too: each row of a tile starts on a multiple.
VEC = 8


class Head(NamedTuple):
    """An LM head, a tile at a time."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # float32 [V] and up to VEC - 1 more
    operands: torch.dtype  # of the products

    def rows(self, tile: Tile) -> Tensor:
        """The weight of a tile, [width, D]."""
        return self.weight[tile.first : tile.first + tile.width].to(self.operands)

    def bias_of(self, tile: Tile) -> Tensor | None:
        return None if self.bias is None else self.bias[tile.first :]


class Tile(NamedTuple):
    first: int
    """Token of the first column."""
    width: int
    kept: Tensor | None
    """float32 [N, width]: where its products stay for the backward, if they do."""


class Scratch:
    """Room for a tile of N rows, made when it is first asked for and used again."""

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
    """Of every tile but the last."""
    vocab_size, hidden_size = head.weight.shape
    # A slice of the weight that must be converted takes room as well.
    converted = hidden_size if head.weight.dtype != head.operands else 1
    columns = max(_TILE_BYTES // (4 * max(num_rows, converted)), _MIN_COLUMNS)
    return min(triton.cdiv(columns, _COLUMN_STEP) * _COLUMN_STEP, vocab_size)


def pitch_of(width: int) -> int:
    return triton.cdiv(width, VEC) * VEC


def tiles_of(num_rows: int, vocab_size: int, columns: int, kept: Tensor) -> Iterator[Tile]:
    """The tiles of a vocabulary; those that ``kept`` [K] has room for stay there.

    What a vocabulary has over a multiple of VEC is a tile of its own: no other needs padding.
    """
    whole = vocab_size // VEC * VEC
    for first, end in pairwise(sorted({*range(0, whole, columns), whole, vocab_size})):
        place = None
        if end <= whole and num_rows * end <= kept.numel():
            place = kept[num_rows * first : num_rows * end].view(num_rows, end - first)
        yield Tile(first, end - first, place)


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right, summed in float32 and rounded to the dtype of ``out`` once: the BLAS may
    round parts of a sum that it writes in half precision (allow_bf16_reduced_precision_reduction).

    Autocast lets products alone whose output is given.
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
    """total += left @ right, in float32."""
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
    """Whether addmm adds products of half precision operands to a float32 tensor. Early versions
    refuse: https://github.com/pytorch/pytorch/issues/154086."""
    total, half = torch.zeros(8, 8, device=device), torch.zeros(8, 8, device=device, dtype=dtype)
    try:
        torch.addmm(total, half, half, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
