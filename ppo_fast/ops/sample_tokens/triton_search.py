"""Functions of the sampling kernels: read a row, and find the least likely token that is kept.

The search does not sort: each pass over the row, mostly from the cache, quarters the range of an
integer key, which is ordered as the logits are.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
        key_0 = (low << IDLE_BITS).to(tl.int32) | tl.where(low < 0, (1 << IDLE_BITS) - 1, 0)
        last = (key_0 ^ ((key_0 >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
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
