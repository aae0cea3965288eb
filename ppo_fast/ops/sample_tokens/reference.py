"""The specification of ``sample_tokens``, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Multipliers and key increments of Philox4x32: Salmon et al. 2011, section 3.3 and Random123.
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_KEY_STEP_0, _KEY_STEP_1 = 0x9E3779B9, 0xBB67AE85
_LOW_32 = 0xFFFFFFFF

# Counters of a block of whole rows: a few arrays of 512 KB, which fit the caches.
_BLOCK_COUNTERS = 2**16

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def sample_tokens(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw tokens; return them, their log-probs and sampling log-probs, as the public function."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous() / temperature
    kept = _truncate(scaled, top_k, top_p)
    tokens = _draw(kept, seeds, positions)
    logprobs = _logprobs(scaled, tokens)
    truncated = kept is not scaled
    return tokens, logprobs, _logprobs(kept, tokens) if truncated else logprobs.clone()


def _logprobs(scaled: Tensor, tokens: Tensor) -> Tensor:
    # Not logsumexp: it splits the sum of a single row over threads, which changes the bits.
    return scaled.log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _truncate(scaled: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set tokens that top_k and top_p exclude to -inf; return ``scaled`` itself if both are off."""
    vocab_size = scaled.shape[-1]
    k = min(top_k, vocab_size) if top_k else vocab_size
    if k == vocab_size and top_p == 1.0:
        return scaled
    largest = scaled.topk(k, dim=-1).values
    if top_p == 1.0:
        return _keep_largest(scaled, largest[:, -1:], k)
    mass = largest.double().softmax(dim=-1).cumsum(dim=-1)
    count = 1 + (mass[:, :-1] < top_p).sum(dim=-1, keepdim=True)
    return _keep_largest(scaled, largest.gather(-1, count - 1), count)


def _keep_largest(scaled: Tensor, smallest: Tensor, count: Tensor | int) -> Tensor:
    """Keep ``count`` tokens a row, down to the value ``smallest``; of ties, the smaller ids."""
    above = scaled > smallest
    tied = scaled == smallest
    room = count - above.sum(dim=-1, keepdim=True)
    keep = above | (tied & (tied.cumsum(dim=-1) <= room))
    return scaled.masked_fill(~keep, -math.inf)


def _draw(scaled: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Return the argmax of scaled + noise, [B]."""
    vocab_size = scaled.shape[-1]
    rows = max(1, _BLOCK_COUNTERS * 4 // vocab_size)
    blocks = zip(scaled.split(rows), seeds.split(rows), positions.split(rows), strict=True)
    tokens = [(z + gumbel_noise(s, p, vocab_size)).argmax(dim=-1) for z, s, p in blocks]
    return torch.cat(tokens)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Compute the noise g of each row's tokens, [B, vocab_size] float32."""
    ids = torch.arange(-(-vocab_size // 4), device=seeds.device)
    zero = torch.zeros_like(ids[:1])
    counter = (ids, positions.unsqueeze(-1) & _LOW_32, zero, zero)
    key = (seeds.unsqueeze(-1) & _LOW_32, (seeds.unsqueeze(-1) >> 32) & _LOW_32)
    noise = torch.empty(len(seeds), len(ids), 4, dtype=torch.float32, device=seeds.device)
    for lane, word in enumerate(philox4x32(counter, key)):
        noise[..., lane] = word
    # The largest float32 below 2^32 gives v = 1 - 2^-24.
    noise.clamp_(1, 2.0**32 - 2.0**8).mul_(-(2.0**-32))
    return noise.log1p_().neg_().log_().neg_().flatten(1)[:, :vocab_size]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Compute four 32-bit words of Philox4x32-10 a counter; int64 tensors that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product's low half becomes one word, its high half part of another. Bits of c1 and c3
        # above the low 32 are not cleared here: only factors of the next products need that.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1 = ((product_1 >> 32) ^ (c1 ^ k0)) & _LOW_32, product_1
        c2, c3 = ((product_0 >> 32) ^ (c3 ^ k1)) & _LOW_32, product_0
        k0, k1 = (k0 + _KEY_STEP_0) & _LOW_32, (k1 + _KEY_STEP_1) & _LOW_32
    return c0, c1 & _LOW_32, c2, c3 & _LOW_32
