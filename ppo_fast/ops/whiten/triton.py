"""The Triton kernels of masked whitening, and their launchers.

csrc/kernels/whiten.hpp states the formulas; here they are in float32. The batch is read as blocks
of tokens. A first launch computes the statistics of each block; in a second launch every program
merges them all, in one fixed order, and writes its block. Bytes moved a token: 14 forward, 22
backward. Saved for backward: the output, the mask and one number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops.backends.triton_launch import Launch, kernel, launch

TOKENS = Launch(2048, 8, registers=80)
MERGED = 256  # blocks whose statistics are merged at once


@triton.jit
def load_block(x, first, num_tokens, BLOCK: tl.constexpr):
    """x[first : first + BLOCK], 0 beyond the end. 16 bytes at once where the block is whole, which
    a mask of unknown length would forbid."""
    token = first + tl.arange(0, BLOCK)
    if first + BLOCK <= num_tokens:
        block = tl.load(x + token)
    else:
        block = tl.load(x + token, mask=token < num_tokens, other=0)
    return block


@triton.jit
def store_block(x, first, num_tokens, block, BLOCK: tl.constexpr):
    """x[first : first + BLOCK] = block, as far as x goes."""
    token = first + tl.arange(0, BLOCK)
    if first + BLOCK <= num_tokens:
        tl.store(x + token, block)
    else:
        tl.store(x + token, block, mask=token < num_tokens)


@kernel
def block_moments_kernel(
    values,  # float32 [N]
    mask,  # bool [N]
    moments,  # out, float32 [4, P]
    num_tokens: tl.int64,
    num_blocks: tl.int64,
    BLOCK: tl.constexpr,
):
    """Compute, for each block, the number of its valid tokens, their mean, the rounding error of
    the mean, and the sum of their squared deviations."""
    program = tl.program_id(0).to(tl.int64)
    first = program * BLOCK
    valid = load_block(mask, first, num_tokens, BLOCK) != 0
    x = tl.where(valid, load_block(values, first, num_tokens, BLOCK), 0.0)
    count = tl.sum(valid.to(tl.float32), 0)
    divisor = tl.maximum(count, 1.0)
    mean = tl.sum(x, 0) / divisor
    centred = tl.where(valid, x - mean, 0.0)
    rest = tl.sum(centred, 0) / divisor
    centred = tl.where(valid, centred - rest, 0.0)
    tl.store(moments + program, count)
    tl.store(moments + num_blocks + program, mean)
    tl.store(moments + 2 * num_blocks + program, rest)
    tl.store(moments + 3 * num_blocks + program, tl.sum(centred * centred, 0))


@triton.jit
def merged_moments(moments, num_blocks, MERGED: tl.constexpr):
    """How many tokens are valid, their mean, what its rounding left out, and the sum of their
    squared deviations.

    Chan, Golub and LeVeque 1983, "Algorithms for Computing the Sample Variance", section 3: the
    blocks deviate from the mean as tokens do, each with the weight of its tokens.
    """
    counts = tl.zeros([MERGED], tl.float32)
    totals = tl.zeros([MERGED], tl.float32)
    for first in range(0, num_blocks, MERGED):
        block = first + tl.arange(0, MERGED)
        exists = block < num_blocks
        count = tl.load(moments + block, mask=exists, other=0.0)
        counts += count
        totals += count * tl.load(moments + num_blocks + block, mask=exists, other=0.0)
    count = tl.sum(counts, 0)
    divisor = tl.maximum(count, 1.0)
    mean = tl.sum(totals, 0) / divisor

    deviations = tl.zeros([MERGED], tl.float32)
    for first in range(0, num_blocks, MERGED):
        block = first + tl.arange(0, MERGED)
        weight, deviation = block_deviation(moments, block, num_blocks, mean)
        deviations += weight * deviation
    rest = tl.sum(deviations, 0) / divisor

    squares = tl.zeros([MERGED], tl.float32)
    for first in range(0, num_blocks, MERGED):
        block = first + tl.arange(0, MERGED)
        exists = block < num_blocks
        within = tl.load(moments + 3 * num_blocks + block, mask=exists, other=0.0)
        weight, deviation = block_deviation(moments, block, num_blocks, mean)
        deviation -= rest
        squares += within + weight * deviation * deviation
    return count, mean, rest, tl.sum(squares, 0)


@triton.jit
def block_deviation(moments, block, num_blocks, mean):
    """The valid tokens of blocks, and their mean's difference to ``mean``."""
    exists = block < num_blocks
    count = tl.load(moments + block, mask=exists, other=0.0)
    block_mean = tl.load(moments + num_blocks + block, mask=exists, other=0.0)
    block_rest = tl.load(moments + 2 * num_blocks + block, mask=exists, other=0.0)
    return count, tl.where(count > 0, (block_mean - mean) + block_rest, 0.0)


@kernel
def whiten_kernel(
    values,  # float32 [N]
    mask,  # bool [N]
    moments,  # float32 [4, P]
    whitened,  # out, float32 [N]
    scale_out,  # out, float32 []
    num_tokens: tl.int64,
    num_blocks: tl.int64,
    MERGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    first = program * BLOCK
    x = load_block(values, first, num_tokens, BLOCK)
    valid = load_block(mask, first, num_tokens, BLOCK) != 0
    count, mean, rest, squares = merged_moments(moments, num_blocks, MERGED)
    # One token deviates from its own mean by nothing.
    scale = tl.where(count > 1, tl.rsqrt(squares / tl.maximum(count - 1, 1.0) + 1e-8), 0.0)
    whitened_x = tl.where(valid, ((x - mean) - rest) * scale, 0.0)
    store_block(whitened, first, num_tokens, whitened_x, BLOCK)
    if program == 0:
        tl.store(scale_out, scale)


@kernel
def block_gradient_sums_kernel(
    grad_whitened,  # float32 [N]
    whitened,  # float32 [N]
    mask,  # bool [N]
    sums,  # out, float32 [3, P]
    num_tokens: tl.int64,
    num_blocks: tl.int64,
    BLOCK: tl.constexpr,
):
    """Compute, for each block, the number of its valid tokens, and their sum(g) and sum(g y)."""
    program = tl.program_id(0).to(tl.int64)
    first = program * BLOCK
    valid = load_block(mask, first, num_tokens, BLOCK) != 0
    g = tl.where(valid, load_block(grad_whitened, first, num_tokens, BLOCK), 0.0)
    y = load_block(whitened, first, num_tokens, BLOCK)
    tl.store(sums + program, tl.sum(valid.to(tl.float32), 0))
    tl.store(sums + num_blocks + program, tl.sum(g, 0))
    tl.store(sums + 2 * num_blocks + program, tl.sum(g * y, 0))


@triton.jit
def merged_sum(sums, num_blocks, MERGED: tl.constexpr):
    """sum(sums[:num_blocks]), always in the same order."""
    total = tl.zeros([MERGED], tl.float32)
    for first in range(0, num_blocks, MERGED):
        block = first + tl.arange(0, MERGED)
        total += tl.load(sums + block, mask=block < num_blocks, other=0.0)
    return tl.sum(total, 0)


@kernel
def whiten_backward_kernel(
    grad_whitened,  # float32 [N]
    whitened,  # float32 [N]
    mask,  # bool [N]
    scale,  # float32 []
    sums,  # float32 [3, P]
    grad_values,  # out, float32 [N]
    num_tokens: tl.int64,
    num_blocks: tl.int64,
    MERGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    first = program * BLOCK
    g = load_block(grad_whitened, first, num_tokens, BLOCK)
    y = load_block(whitened, first, num_tokens, BLOCK)
    valid = load_block(mask, first, num_tokens, BLOCK) != 0
    count = merged_sum(sums, num_blocks, MERGED)
    mean = merged_sum(sums + num_blocks, num_blocks, MERGED) / tl.maximum(count, 1.0)
    slope = merged_sum(sums + 2 * num_blocks, num_blocks, MERGED) / tl.maximum(count - 1, 1.0)
    # With one token or none the scale is 0.
    gradient = tl.where(valid, (g - mean - y * slope) * tl.load(scale), 0.0)
    store_block(grad_values, first, num_tokens, gradient, BLOCK)


def whiten(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the same as cpp.whiten on a GPU, in float32."""
    values, mask, device = values.contiguous(), mask.contiguous(), values.device
    whitened = torch.empty(values.shape, dtype=torch.float32, device=device)
    scale = torch.empty((), dtype=torch.float32, device=device)
    num_blocks = triton.cdiv(values.numel(), TOKENS.block)
    moments = torch.empty(4, num_blocks, dtype=torch.float32, device=device)
    sizes = values.numel(), num_blocks
    launch(block_moments_kernel, num_blocks, TOKENS, device, values, mask, moments, *sizes)
    launch(
        whiten_kernel,
        num_blocks,
        TOKENS,
        device,
        values,
        mask,
        moments,
        whitened,
        scale,
        *sizes,
        MERGED=MERGED,
    )
    return whitened, scale.double()


def whiten_backward(grad_whitened: Tensor, whitened: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    """Compute the same as cpp.whiten_backward on a GPU."""
    device = whitened.device
    operands = grad_whitened.contiguous(), whitened.contiguous(), mask.contiguous()
    grad_values = torch.empty(whitened.shape, dtype=torch.float32, device=device)
    num_blocks = triton.cdiv(whitened.numel(), TOKENS.block)
    sums = torch.empty(3, num_blocks, dtype=torch.float32, device=device)
    sizes = whitened.numel(), num_blocks
    launch(block_gradient_sums_kernel, num_blocks, TOKENS, device, *operands, sums, *sizes)
    launch(
        whiten_backward_kernel,
        num_blocks,
        TOKENS,
        device,
        *operands,
        scale.float(),
        sums,
        grad_values,
        *sizes,
        MERGED=MERGED,
    )
    return grad_values
