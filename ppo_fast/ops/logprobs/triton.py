"""The Triton kernels of logprobs_from_logits, and their launchers.

csrc/kernels/logprobs.hpp states the formulas. Bytes moved: forward reads the logits once; backward
reads them once and writes their gradient once. Masked rows are not read. The order in which a row
is summed depends on where it starts between two multiples of 16 bytes, so that its last bit may
too; it depends on nothing else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops.backends.cpp_launch import merged_strides
from ppo_fast.ops.backends.triton_launch import (
    Launch,
    Rows,
    aligned,
    edge_columns,
    kernel,
    launch,
    row_offset,
    split_row,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LOG_2 = tl.constexpr(0.6931471805599453)

# By the bytes of a logit. Forward: an SM runs four or five programs of eight warps, each with two
# blocks of loads in flight: 32 KB, as much as an H200 needs.
FORWARD = {2: Launch(2048, 8, registers=64), 4: Launch(2048, 8, registers=64)}
BACKWARD = {2: Launch(2048, 8, registers=64), 4: Launch(2048, 8, registers=64)}
SPAN = 4  # blocks a program of the backward takes: its beginning costs as much as one


@triton.jit
def softmax_fold(x, maximum, total, weighted, scale, ENTROPY: tl.constexpr):
    """Running sums a lane of softmax(x / t), scale = log2(e) / t, after a block x more.

    With m the maximum so far and d = (x - m) * scale: total = sum 2^d, weighted = sum 2^d d.
    Milakov and Gimelshein 2018 (arXiv 1805.02867), algorithm 3, a block at a time.
    """
    # While nothing but -inf was seen, any finite shift will do: 2^(-inf - 0) is 0.
    higher = tl.maximum(maximum, tl.max(x, 0))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    fall = tl.where(maximum == float("-inf"), 0.0, (maximum - shift) * scale)
    shrink = tl.exp2(fall)
    d = (x - shift) * scale
    share = tl.exp2(d)
    if ENTROPY:
        weighted = (weighted + fall * total) * shrink + share * tl.maximum(d, -127.0)
    return higher, total * shrink + share, weighted


@triton.jit
def moved_sums(total, weighted, before, maximum, scale):
    """The sums of softmax_fold under the maximum ``before``, as they are under a later one."""
    fall = tl.where(before == float("-inf"), 0.0, (before - maximum) * scale)
    shrink = tl.exp2(fall)
    return total * shrink, (weighted + fall * total) * shrink


@triton.jit
def store_masked_row(row, logprobs, entropies, stats, ENTROPY: tl.constexpr):
    """The forward's outputs of a row that does not count."""
    tl.store(logprobs + row, 0.0)
    tl.store(stats + 2 * row, 0.0)
    tl.store(stats + 2 * row + 1, 0.0)
    if ENTROPY:
        tl.store(entropies + row, 0.0)


@kernel
def logprobs_forward_kernel(
    logits,  # [N, V] as Rows
    labels,  # int64 [N]
    mask,  # bool [N], or None
    logprobs,  # out, float32 [N]
    entropies,  # out, float32 [N]; untouched without ENTROPY
    stats,  # out, float32 [N, 2]: the maximum m and sum_j exp((x_j - m) / t)
    offset: tl.int64,
    outer_stride: tl.int64,
    inner: tl.int64,
    inner_stride: tl.int64,
    vocab_size: tl.int64,
    inverse_temperature: tl.float32,
    ENTROPY: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    counts = True if mask is None else tl.load(mask + row) != 0
    if not counts:
        store_masked_row(row, logprobs, entropies, stats, ENTROPY)
        return
    start = row_offset(row, offset, outer_stride, inner, inner_stride)
    head, body, body_length = split_row(start, vocab_size, VEC)
    scale = inverse_temperature * LOG2_E

    edge, exists = edge_columns(head, body_length, vocab_size, VEC)
    edge_x = tl.load(logits + start + edge, mask=exists, other=float("-inf")).to(tl.float32)
    none = tl.zeros([2 * VEC], tl.float32)
    maximum, edge_total, edge_weighted = softmax_fold(
        edge_x, float("-inf"), none, none, scale, ENTROPY
    )
    before = maximum
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    lane = tl.arange(0, BLOCK)
    ahead = tl.load(logits + body + lane, mask=lane < body_length, other=float("-inf"))
    for following in range(BLOCK, body_length + BLOCK, BLOCK):
        x = ahead.to(tl.float32)
        column = following + lane  # on their way while this block is folded
        ahead = tl.load(logits + body + column, mask=column < body_length, other=float("-inf"))
        maximum, total, weighted = softmax_fold(x, maximum, total, weighted, scale, ENTROPY)
    # The edges' sums move to the last maximum at once.
    moved_total, moved_weighted = moved_sums(
        tl.sum(edge_total, 0), tl.sum(edge_weighted, 0), before, maximum, scale
    )
    sum_total = tl.sum(total, 0) + moved_total
    log_total = tl.log(sum_total)

    label = tl.load(labels + row)
    # The public function cannot look at labels on a GPU.
    is_token = (label >= 0) & (label < vocab_size)
    chosen = tl.load(logits + start + label, mask=is_token, other=0.0).to(tl.float32)
    chosen = tl.where(is_token, chosen, float("nan"))
    tl.store(logprobs + row, (chosen - maximum) * inverse_temperature - log_total)
    tl.store(stats + 2 * row, maximum)
    tl.store(stats + 2 * row + 1, sum_total)
    if ENTROPY:
        sum_weighted = tl.sum(weighted, 0) + moved_weighted
        tl.store(entropies + row, log_total - LOG_2 * sum_weighted / sum_total)


@triton.jit
def logit_gradient(x, column, label, maximum, scale, c0, c1, at_label):
    """2^d (c0 + c1 d) + at_label [j = y], 0 where p = 0: csrc/kernels/logprobs.hpp."""
    d = (x.to(tl.float32) - maximum) * scale
    gradient = tl.exp2(d) * (c0 + c1 * tl.maximum(d, -127.0))
    return tl.where(column == label, gradient + at_label, gradient)


@triton.jit
def gradient_coefficients(a, b, entropy, total, inverse_temperature):
    """c0 and c1 of RowGradient in csrc/kernels/logprobs.hpp."""
    share = -inverse_temperature / total
    return share * (a + b * (entropy - tl.log(total))), share * b * LOG_2


@triton.jit
def upstream_of(row, mask, grad_logprobs, grad_entropy):
    """a and b of a row; 0 where it does not count, and for a gradient that is None."""
    a, b = 0.0, 0.0
    if grad_logprobs is not None:
        a = tl.load(grad_logprobs + row)
    if grad_entropy is not None:
        b = tl.load(grad_entropy + row)
    if mask is not None:
        counts = tl.load(mask + row) != 0
        a = tl.where(counts, a, 0.0)
        b = tl.where(counts, b, 0.0)
    return a, b


@kernel
def logprobs_backward_kernel(
    logits,  # [N, V] as Rows
    labels,  # int64 [N]
    mask,  # bool [N], or None
    entropies,  # float32 [N]; read with grad_entropy
    stats,  # float32 [N, 2]
    grad_logprobs,  # float32 [N], a; or None: 0
    grad_entropy,  # float32 [N], b; or None: 0
    grad_logits,  # out, of the logits' dtype, [N, V] contiguous
    offset: tl.int64,
    outer_stride: tl.int64,
    inner: tl.int64,
    inner_stride: tl.int64,
    vocab_size: tl.int64,
    parts: tl.int64,
    inverse_temperature: tl.float32,
    IN_PHASE: tl.constexpr,  # rows of both start alike between multiples of 16 bytes
    SPAN: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``parts`` programs a row, SPAN blocks of columns each; the first takes the edges too."""
    row = (tl.program_id(0) // parts.to(tl.int32)).to(tl.int64)
    part = (tl.program_id(0) % parts.to(tl.int32)).to(tl.int64)
    a, b = upstream_of(row, mask, grad_logprobs, grad_entropy)

    start = row_offset(row, offset, outer_stride, inner, inner_stride)
    head, body, body_length = split_row(start, vocab_size, VEC)
    to = row * vocab_size
    if IN_PHASE:
        _, to_body, _ = split_row(to, vocab_size, VEC)
    else:
        to_body = to + head
    lane = tl.arange(0, BLOCK)
    part_start = part * (SPAN * BLOCK)
    part_end = tl.minimum(part_start + SPAN * BLOCK, body_length)
    edge, exists = edge_columns(head, body_length, vocab_size, VEC)
    exists = exists & (edge < tl.where(part == 0, vocab_size, 0))
    live = (a != 0.0) | (b != 0.0)
    readable = tl.where(live, vocab_size, 0)  # columns; of other rows the gradient is 0
    readable_body = tl.where(live, body_length, 0)
    maximum = tl.load(stats + 2 * row, mask=live, other=0.0)
    total = tl.load(stats + 2 * row + 1, mask=live, other=1.0)
    entropy = 0.0
    if grad_entropy is not None:
        entropy = tl.load(entropies + row, mask=live, other=0.0)
    c0, c1 = gradient_coefficients(a, b, entropy, total, inverse_temperature)
    scale = inverse_temperature * LOG2_E
    label = tl.load(labels + row)
    at_label = a * inverse_temperature

    x = tl.load(logits + start + edge, mask=exists & (edge < readable), other=0.0)
    at_edge = logit_gradient(x, edge, label, maximum, scale, c0, c1, at_label)
    tl.store(grad_logits + to + edge, at_edge.to(grad_logits.dtype.element_ty), mask=exists)
    for first in range(part_start, part_end, BLOCK):
        column = first + lane
        inside = column < body_length
        block = tl.load(logits + body + column, mask=column < readable_body, other=0.0)
        gradient = logit_gradient(block, head + column, label, maximum, scale, c0, c1, at_label)
        gradient = gradient.to(grad_logits.dtype.element_ty)
        tl.store(grad_logits + to_body + column, gradient, mask=inside)


def logprobs_forward(
    logits: Tensor, labels: Tensor, mask: Tensor | None, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same as cpp.logprobs_forward on a GPU, in float32, bfloat16 or float16."""
    lead, vocab_size, device = labels.shape, logits.shape[-1], logits.device
    logprobs = torch.empty(lead, dtype=torch.float32, device=device)
    stats = torch.empty(*lead, 2, dtype=torch.float32, device=device)
    entropy = torch.empty(lead if with_entropy else 0, dtype=torch.float32, device=device)
    rows = _rows(logits)
    launch(
        logprobs_forward_kernel,
        labels.numel(),
        FORWARD[logits.element_size()],
        device,
        rows.start,
        labels.contiguous(),
        mask if mask is None else mask.contiguous(),
        logprobs,
        entropy,
        stats,
        *rows[1:],
        vocab_size,
        1 / temperature,
        ENTROPY=with_entropy,
        VEC=16 // logits.element_size(),
    )
    return logprobs, entropy, stats


def logprobs_backward(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    temperature: float,
    entropy: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Compute the same as cpp.logprobs_backward on a GPU."""
    num_rows, vocab_size = labels.numel(), logits.shape[-1]
    how = BACKWARD[logits.element_size()]
    rows = _rows(logits)
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    parts = triton.cdiv(vocab_size, SPAN * how.block)
    launch(
        logprobs_backward_kernel,
        num_rows * parts,
        how,
        logits.device,
        rows.start,
        labels.contiguous(),
        mask if mask is None else mask.contiguous(),
        entropy,
        stats,
        grad_logprobs if grad_logprobs is None else grad_logprobs.contiguous(),
        grad_entropy if grad_entropy is None else grad_entropy.contiguous(),
        grad_logits,
        *rows[1:],
        vocab_size,
        parts,
        1 / temperature,
        IN_PHASE=rows.in_phase(num_rows, vocab_size),
        SPAN=SPAN,
        VEC=16 // logits.element_size(),
    )
    return grad_logits


def _rows(logits: Tensor) -> Rows:
    """Return the logits as Rows; other layouts are copied."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    sizes, strides = merged_strides(logits)
    if len(sizes) > 2:
        logits = logits.contiguous()
        sizes, strides = merged_strides(logits)
    start, offset = aligned(logits)
    if len(sizes) == 2:
        return Rows(start, offset, strides[0], sizes[1], strides[1])
    return Rows(start, offset, strides[0] if sizes else 0, 1, 0)
