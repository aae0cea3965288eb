"""Shared code of the Triton kernels of losses over [B, T]: they reduce tokens to sums and extrema.

The tokens of contiguous [B, T] tensors are one sequence of N = B * T numbers. P programs go through
it, a block each at a time, and each writes a column of ``partials`` [1 + K, P]: the loss before the
normalizer, and K statistics. A second kernel reduces the rows in a fixed order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops.backends.triton_launch import Launch, kernel, launch
from ppo_fast.ops.stats import Reduction

VEC = tl.constexpr(4)  # float32 numbers in 16 bytes
MAX_PROGRAMS = 1024
REDUCE = Launch(MAX_PROGRAMS, 4, registers=32)


@triton.jit
def tokens_end(num_tokens, ALIGNED: tl.constexpr):
    """``num_tokens``. ALIGNED: a multiple of VEC, as the compiler now sees; it loads 16 bytes at
    once."""
    return num_tokens // VEC * VEC if ALIGNED else num_tokens


@triton.jit
def normalizer_of(tensor, number):
    """One of the two: ``number`` where ``tensor`` is None; 0 counts as 1."""
    if tensor is not None:
        number = tl.load(tensor)
    return tl.where(number == 0.0, 1.0, number)


@triton.jit
def added(sums, blocks):
    """Running sums [BLOCK // VEC] and one block each more. A thread holds the VEC neighbours that
    are added up here, so that a sum takes one register."""
    result = ()
    for i in tl.static_range(len(blocks)):
        x = blocks[i].to(tl.float32)
        x = sums[i] + tl.sum(tl.reshape(x, [x.shape[0] // VEC, VEC]), 1)
        result = result + (x,)  # noqa: RUF005 - Triton has no star
    return result


@triton.jit
def smaller(low, x, valid):
    """The running minimum of the valid ones; NaN where one is."""
    x = tl.where(valid, x, float("inf"))
    return tl.minimum(low, x, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger(high, x, valid):
    """The running maximum, likewise."""
    x = tl.where(valid, x, float("-inf"))
    return tl.maximum(high, x, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def nan_of(x):
    """NaN where one of a block is, which tl.min and tl.max drop; else 0."""
    return tl.sum(tl.where(x != x, x, 0.0), 0)


@triton.jit
def smallest(low):
    """As torch.amin."""
    return tl.min(low, 0) + nan_of(low)


@triton.jit
def largest(high):
    """As torch.amax."""
    return tl.max(high, 0) + nan_of(high)


@triton.jit
def store_column(partials, sums, extrema):
    """Store this program's partial results: sums over its lanes, then its extrema."""
    column = partials + tl.program_id(0)
    for i in tl.static_range(len(sums)):
        tl.store(column + i * tl.num_programs(0), tl.sum(sums[i], 0))
    for i in tl.static_range(len(extrema)):
        tl.store(column + (len(sums) + i) * tl.num_programs(0), extrema[i])


@kernel
def reduce_partials_kernel(
    partials,  # float32 [1 + K, P]
    normalizer,  # float32 [1], or None: normalizer_number
    loss,  # out, float32 [1]
    stats,  # out, float32 [K]: sums, then minima, then maxima
    normalizer_number: tl.float32,
    num_partials: tl.int64,  # up to BLOCK
    NUM_SUMS: tl.constexpr,
    NUM_MINIMA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row of ``partials``: the loss is the first."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < num_partials
    x = tl.load(partials + row * num_partials + column, mask=inside, other=0.0)
    if row == 0:
        tl.store(loss, tl.sum(x, 0) / normalizer_of(normalizer, normalizer_number))
    elif row <= NUM_SUMS:
        tl.store(stats + row - 1, tl.sum(x, 0))
    elif row <= NUM_SUMS + NUM_MINIMA:
        tl.store(stats + row - 1, smallest(tl.where(inside, x, float("inf"))))
    else:
        tl.store(stats + row - 1, largest(tl.where(inside, x, float("-inf"))))


def reduce_partials(
    partials: Tensor, layout: Mapping[str, Reduction], normalizer: Tensor | None, number: float
) -> tuple[Tensor, Tensor]:
    """Return loss [] and stats [K] from float32 partials [1 + K, P]; P = 0: there are no tokens."""
    reductions = list(layout.values())
    loss = torch.empty((), dtype=torch.float32, device=partials.device)
    stats = torch.empty(len(layout), dtype=torch.float32, device=partials.device)
    launch(
        reduce_partials_kernel,
        1 + len(layout),
        REDUCE,
        partials.device,
        partials,
        normalizer,
        loss,
        stats,
        number,
        partials.shape[1],
        NUM_SUMS=reductions.count("sum"),
        NUM_MINIMA=reductions.count("min"),
    )
    return loss, stats


def empty_partials(
    num_tokens: int, how: Launch, layout: Mapping[str, Reduction], device: torch.device
) -> Tensor:
    """Return empty partials [1 + K, P]: a program for each block, but at most MAX_PROGRAMS."""
    num_programs = min(triton.cdiv(num_tokens, how.block), MAX_PROGRAMS)
    return torch.empty(1 + len(layout), num_programs, dtype=torch.float32, device=device)


def on_device(normalizer: float | Tensor, device: torch.device) -> tuple[Tensor | None, float]:
    """Return ``normalizer`` as ``normalizer_of`` takes it: a tensor, or None and a number.

    A tensor on ``device`` is not read here: that would wait for the device.
    """
    if isinstance(normalizer, Tensor) and normalizer.device == device:
        return normalizer.to(torch.float32), 0.0
    return None, float(normalizer)


def contiguous_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
