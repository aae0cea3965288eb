"""The Triton kernels of sample_tokens, and their launcher.

Draws are as in csrc/kernels/sample_tokens.hpp, with the noise of ppo_fast/ops/sample_tokens/api.py.
Bytes moved: without truncation, the logits once. With truncation a row is read again a few times,
mostly from the cache: to find the least likely token kept, and to draw.

Tokens 4 i to 4 i + 3 share a counter of the generator. A block therefore begins at a token 4 i,
wherever the row starts in memory: aligned loads of a row that starts elsewhere would straddle two
counters, and twice the words would be computed. If all rows start on 16 bytes, a load takes 16
bytes, else one logit; that costs three of about 35 instructions a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops.backends.triton_launch import Launch, aligned, kernel, launch
from ppo_fast.ops.logprobs.triton import LOG2_E, softmax_fold
from ppo_fast.ops.sample_tokens.triton_search import (
    above_and_at,
    id_of_tie,
    interleave_four,
    last_kept,
    load_block,
    row_of,
)

# By the bytes of a logit. Longer blocks would take more registers, and the noise is more work than
# the loads.
PLAIN = {2: Launch(2048, 8, registers=104), 4: Launch(2048, 8, registers=104)}
TRUNCATED = {2: Launch(2048, 8, registers=104), 4: Launch(2048, 8, registers=104)}

# Low bits that are the same in all keys of a dtype's numbers, see ordered_key.
IDLE_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}

LARGEST_NOISE = tl.constexpr(22.1808)  # above 32 log 2
# A token further below the likeliest is never drawn, and all of those together weigh nothing.
REACH = tl.constexpr(40.0)
NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def gumbel_noise(word):
    """g of the generator's words. Its large values decide draws, and those are as exact as
    -log1p(-v) of a small v is relative to itself."""
    v = tl.minimum(tl.maximum(word, 1).to(tl.float32) * 2.0**-32, 1.0 - 2.0**-24)
    u = 1.0 - v
    missing = (-v - (u - 1.0)) / u  # log1p(-v) - log(u), as csrc/base/math.hpp
    return -tl.log(tl.where(u == 1.0, v, -(tl.log(u) + missing)))


@triton.jit
def draw_from(
    x,  # float32 [BLOCK]; -inf where a token must not be drawn
    first,
    best,
    best_id,
    maximum,
    seed,
    position,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    """The best x / t + noise so far and its token, after a block x more: the tokens from ``first``
    on. ``maximum`` is no less than the largest x so far.

    As in C++, a block is left alone where a bound says that nothing in it comes to the best: with
    the largest noise, or each token with that of its own word. Since -log1p(-v) >= v, a token that
    does has v <= exp(x / t - best), which the softmax has computed but for a factor.
    """
    margin = 1e-4 + tl.abs(best) * 2.0**-20  # above all rounding errors
    if tl.max(x, 0) * inverse_temperature + LARGEST_NOISE + margin > best:
        group = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
        zero = position ^ position
        low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox_impl(group, position, zero, zero, low, high)
        word = interleave_four(w0, w1, w2, w3)
        shift = tl.where(maximum == float("-inf"), 0.0, maximum)
        share = tl.exp2((x - shift) * (inverse_temperature * LOG2_E))
        lead = maximum * inverse_temperature - best + margin
        largest = share * tl.exp2(tl.minimum(lead, REACH) * LOG2_E + 32.0)
        if (lead > REACH) | (tl.max(largest - word.to(tl.float32), 0) >= 0.0):
            value = x * inverse_temperature + gumbel_noise(word)
            top = tl.max(value, 0)
            token = first + tl.arange(0, BLOCK)
            top_id = tl.min(tl.where(value == top, token, NO_ID), 0)
            best_id = tl.where(top > best, top_id, best_id)
            best = tl.maximum(top, best)
    return best, best_id


@triton.jit
def store_draw(
    i,
    token,
    row,
    maximum,
    total,
    mass,
    inverse_temperature,
    tokens,
    logprobs,
    sampling_logprobs,
):
    """NaN for a row with NaN or +inf, or nothing but -inf; also where x / t overflows."""
    scaled = maximum * inverse_temperature
    is_distribution = (tl.abs(scaled) < float("inf")) & (total < float("inf"))
    x = tl.load(row + token).to(tl.float32)
    d = tl.where(is_distribution, (x - maximum) * inverse_temperature, float("nan"))
    tl.store(tokens + i, token.to(tl.int64))
    tl.store(logprobs + i, d - tl.log(total))
    tl.store(sampling_logprobs + i, d - tl.log(mass))


@kernel
def sample_kernel(
    logits,  # [B, V]
    seeds,  # int64 [B]
    positions,  # int64 [B]
    tokens,  # out, int64 [B]
    logprobs,  # out, float32 [B]
    sampling_logprobs,  # out, float32 [B]
    offset: tl.int64,
    row_stride: tl.int64,
    vocab_size: tl.int64,
    temperature: tl.float32,
    inverse_temperature: tl.float32,
    ALIGNED: tl.constexpr,  # offset, row_stride and vocab_size are multiples of VEC
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row."""
    i = tl.program_id(0).to(tl.int64)
    row, length = row_of(logits, i, offset, row_stride, vocab_size, ALIGNED, VEC)
    seed, position = tl.load(seeds + i), tl.load(positions + i).to(tl.uint32)
    scale = inverse_temperature * LOG2_E
    maximum = float("-inf")
    total = tl.zeros([BLOCK], tl.float32)
    best, best_id = float("-inf"), tl.zeros([], tl.int32)
    for first in range(0, length, BLOCK):
        x = load_block(row, first, length, ALIGNED, BLOCK)
        maximum, total, _ = softmax_fold(x, maximum, total, total, scale, False)
        best, best_id = draw_from(
            x,
            first,
            best,
            best_id,
            maximum,
            seed,
            position,
            inverse_temperature,
            BLOCK,
        )
    total = tl.sum(total, 0)
    store_draw(
        i,
        best_id,
        row,
        maximum,
        total,
        total,
        inverse_temperature,
        tokens,
        logprobs,
        sampling_logprobs,
    )


@kernel
def sample_truncated_kernel(
    logits,  # [B, V]
    seeds,  # int64 [B]
    positions,  # int64 [B]
    tokens,  # out, int64 [B]
    logprobs,  # out, float32 [B]
    sampling_logprobs,  # out, float32 [B]
    offset: tl.int64,
    row_stride: tl.int64,
    vocab_size: tl.int64,
    temperature: tl.float32,
    inverse_temperature: tl.float32,
    top_k: tl.int64,  # 1 to vocab_size
    top_p: tl.float32,
    IDLE_BITS: tl.constexpr,
    ALIGNED: tl.constexpr,  # offset, row_stride and vocab_size are multiples of VEC
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row."""
    i = tl.program_id(0).to(tl.int64)
    row, length = row_of(logits, i, offset, row_stride, vocab_size, ALIGNED, VEC)
    scale = inverse_temperature * LOG2_E
    maximum = float("-inf")
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, length, BLOCK):
        x = load_block(row, first, length, ALIGNED, BLOCK)
        maximum, total, _ = softmax_fold(x, maximum, total, total, scale, False)
    total = tl.sum(total, 0)

    # Kept are the logits above ``last``, and the first ``room`` of the ``ties`` with it.
    last = maximum - REACH * temperature
    mass = total
    ties = 0
    room = 0
    if top_k < vocab_size:
        k = top_k.to(tl.int32)
        last = last_kept(
            row, length, last, maximum, scale, k.to(tl.float32), False, IDLE_BITS, ALIGNED, BLOCK
        )
        above, mass, ties = above_and_at(row, length, last, maximum, scale, ALIGNED, BLOCK)
        room = tl.minimum(k - above, ties)
        mass += room.to(tl.float32) * tl.exp2((last - maximum) * scale)
    if top_p < 1.0:
        target = top_p * mass
        of_k, room_of_k = last, tl.where(top_k < vocab_size, room, NO_ID)
        last = last_kept(row, length, last, maximum, scale, target, True, IDLE_BITS, ALIGNED, BLOCK)
        above, mass, ties = above_and_at(row, length, last, maximum, scale, ALIGNED, BLOCK)
        share = tl.exp2((last - maximum) * scale)
        needed = tl.maximum(tl.ceil((target - mass) / share), 1.0)
        most = tl.minimum(ties, tl.where(last == of_k, room_of_k, NO_ID))
        room = tl.minimum(needed, most.to(tl.float32)).to(tl.int32)
        mass += room.to(tl.float32) * share
    last_id = length
    if room < ties:
        last_id = id_of_tie(row, length, last, room, ALIGNED, BLOCK)

    seed, position = tl.load(seeds + i), tl.load(positions + i).to(tl.uint32)
    best, best_id = float("-inf"), tl.zeros([], tl.int32)
    for first in range(0, length, BLOCK):
        x = load_block(row, first, length, ALIGNED, BLOCK)
        kept = (x > last) | ((x == last) & (first + tl.arange(0, BLOCK) <= last_id))
        best, best_id = draw_from(
            tl.where(kept, x, float("-inf")),
            first,
            best,
            best_id,
            maximum,
            seed,
            position,
            inverse_temperature,
            BLOCK,
        )
    store_draw(
        i,
        best_id,
        row,
        maximum,
        total,
        mass,
        inverse_temperature,
        tokens,
        logprobs,
        sampling_logprobs,
    )


def sample_tokens(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same as reference.sample_tokens on a GPU, in float32, bfloat16 or float16."""
    num_rows, vocab_size = logits.shape
    device = logits.device
    if logits.stride(1) != 1 and vocab_size > 1:
        logits = logits.contiguous()
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=device)
    sampling_logprobs = torch.empty(num_rows, dtype=torch.float32, device=device)
    start, offset = aligned(logits)
    vec = 16 // logits.element_size()
    k = min(top_k, vocab_size) if top_k else vocab_size
    truncated = k < vocab_size or top_p < 1
    arguments = (
        start,
        seeds.contiguous(),
        positions.contiguous(),
        tokens,
        logprobs,
        sampling_logprobs,
        offset,
        logits.stride(0),
        vocab_size,
        temperature,
        1 / temperature,
    )
    is_aligned = all(n % vec == 0 for n in (offset, logits.stride(0), vocab_size))
    if truncated:
        launch(
            sample_truncated_kernel,
            num_rows,
            TRUNCATED[logits.element_size()],
            device,
            *arguments,
            k,
            top_p,
            IDLE_BITS=IDLE_BITS[logits.dtype],
            ALIGNED=is_aligned,
            VEC=vec,
        )
    else:
        launch(
            sample_kernel,
            num_rows,
            PLAIN[logits.element_size()],
            device,
            *arguments,
            ALIGNED=is_aligned,
            VEC=vec,
        )
    return tokens, logprobs, sampling_logprobs
