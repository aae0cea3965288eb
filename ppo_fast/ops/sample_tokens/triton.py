"""The Triton kernels of sample_tokens, and their launcher.

The draw is csrc/sample_tokens.hpp's, and its noise that of ppo_fast/ops/sample_tokens/api.py. Bytes
moved: the logits once without truncation. With it the row is read again a few times, mostly from
the cache: to find the least likely token kept, and to draw.

Tokens 4 i to 4 i + 3 share a counter of the generator. A block therefore begins at such a token,
wherever the row starts in memory: aligned loads of a row that starts elsewhere would straddle two
counters, and twice the words would be computed. Where all rows start on 16 bytes so much is loaded
at once, elsewhere a logit: three instructions a token of about 35.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops.gpu import Launch, aligned, kernel, launch
from ppo_fast.ops.logprobs.triton import LOG2_E, softmax_fold

# By the bytes of a logit. Longer blocks of a thread take registers, and the noise is more work than
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
def row_of(logits, i, offset, row_stride, vocab_size, ALIGNED: tl.constexpr, VEC: tl.constexpr):
    """Where row i starts, and its length; as multiples that the compiler sees, if they are."""
    start = offset + i * row_stride
    length = vocab_size.to(tl.int32)
    if ALIGNED:
        start = start // VEC * VEC
        length = length // VEC * VEC
    return logits + start, length


@triton.jit
def interleave_four(a, b, c, d):
    """a[0], b[0], c[0], d[0], a[1], ..."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def load_block(row, first, length, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Logits of the tokens from ``first`` on, float32 [BLOCK]; -inf past the end of the row."""
    if ALIGNED:
        token = first + tl.arange(0, BLOCK)
        x = tl.load(row + token, mask=token < length, other=float("-inf"))
    else:
        token = first + 4 * tl.arange(0, BLOCK // 4)
        x = interleave_four(
            tl.load(row + token, mask=token < length, other=float("-inf")),
            tl.load(row + token + 1, mask=token + 1 < length, other=float("-inf")),
            tl.load(row + token + 2, mask=token + 2 < length, other=float("-inf")),
            tl.load(row + token + 3, mask=token + 3 < length, other=float("-inf")),
        )
    return x.to(tl.float32)


@triton.jit
def gumbel_noise(word):
    """g of the generator's words. Its large values decide draws, and those are as exact as
    -log1p(-v) of a small v is relative to itself."""
    v = tl.minimum(tl.maximum(word, 1).to(tl.float32) * 2.0**-32, 1.0 - 2.0**-24)
    u = 1.0 - v
    missing = (-v - (u - 1.0)) / u  # log1p(-v) - log(u), as csrc/math.hpp
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


@triton.jit
def ordered_key(x):
    """An int32 that is larger for a larger float32."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def last_kept(
    row,
    length,
    lowest,
    maximum,
    scale,
    target,
    MASS: tl.constexpr,
    IDLE_BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A number, ``lowest`` or above, from which on the logits are the fewest whose mass (or count)
    is ``target`` at least, or all from ``lowest`` on; ties are all in. Two bits of its key are
    found at a time, until the last of these logits is known from those before it."""
    low = (ordered_key(lowest) >> IDLE_BITS).to(tl.int64)
    high = (ordered_key(maximum) >> IDLE_BITS).to(tl.int64) + 1
    last = lowest
    from_low = float("inf")
    from_high = 0.0
    several = True
    while several & (high - low > 1):
        width = high - low
        key_1 = ((low + width // 4) << IDLE_BITS).to(tl.int32)
        key_2 = ((low + width * 2 // 4) << IDLE_BITS).to(tl.int32)
        key_3 = ((low + width * 3 // 4) << IDLE_BITS).to(tl.int32)
        from_1 = tl.zeros([BLOCK], tl.float32)
        from_2 = tl.zeros([BLOCK], tl.float32)
        from_3 = tl.zeros([BLOCK], tl.float32)
        for first in range(0, length, BLOCK):
            x = load_block(row, first, length, ALIGNED, BLOCK)
            key = ordered_key(x)
            weight = tl.exp2((x - maximum) * scale) if MASS else 1.0
            from_1 += tl.where(key >= key_1, weight, 0.0)
            from_2 += tl.where(key >= key_2, weight, 0.0)
            from_3 += tl.where(key >= key_3, weight, 0.0)
        sum_1, sum_2, sum_3 = tl.sum(from_1, 0), tl.sum(from_2, 0), tl.sum(from_3, 0)
        in_1, in_2, in_3 = sum_1 >= target, sum_2 >= target, sum_3 >= target
        quarter = in_1.to(tl.int64) + in_2.to(tl.int64) + in_3.to(tl.int64)
        high = low + width * (quarter + 1) // 4
        low = low + width * quarter // 4
        from_high = tl.where(in_3, from_high, tl.where(in_2, sum_3, tl.where(in_1, sum_2, sum_1)))
        from_low = tl.where(in_3, sum_3, tl.where(in_2, sum_2, tl.where(in_1, sum_1, from_low)))
        # The idle bits of a negative number are ones in its key.
        key = (low << IDLE_BITS).to(tl.int32) | tl.where(low < 0, (1 << IDLE_BITS) - 1, 0)
        last = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        least = tl.exp2((last - maximum) * scale) if MASS else 1.0
        several = from_low - from_high > 1.5 * least
    return last


@triton.jit
def above_and_at(row, length, last, maximum, scale, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """How many logits lie above ``last``, their mass, and how many are ``last``."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    ties = tl.zeros([BLOCK], tl.int32)
    for first in range(0, length, BLOCK):
        x = load_block(row, first, length, ALIGNED, BLOCK)
        count += (x > last).to(tl.int32)
        mass += tl.where(x > last, tl.exp2((x - maximum) * scale), 0.0)
        ties += (x == last).to(tl.int32)
    return tl.sum(count, 0), tl.sum(mass, 0), tl.sum(ties, 0)


@triton.jit
def id_of_tie(row, length, last, rank, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The token that is number ``rank``, from 1 on, of those whose logit is ``last``."""
    found = 0
    before = 0
    for first in range(0, length, BLOCK):
        tied = (load_block(row, first, length, ALIGNED, BLOCK) == last).to(tl.int32)
        is_it = (tied != 0) & (before + tl.cumsum(tied, 0) == rank)
        found = tl.maximum(found, tl.max(tl.where(is_it, first + tl.arange(0, BLOCK), 0), 0))
        before += tl.sum(tied, 0)
    return found


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
    """As reference.sample_tokens, on the device of the logits: float32, bfloat16 or float16."""
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
