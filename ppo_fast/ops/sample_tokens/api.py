"""``sample_tokens``: validation and dispatch."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ppo_fast.ops.backends import library
from ppo_fast.ops.backends.dispatch import choose
from ppo_fast.ops.backends.impls import Impl
from ppo_fast.ops.sample_tokens import reference
from ppo_fast.ops.validation import (
    check_floating,
    check_int64,
    check_temperature,
    values_readable,
)


class Sampled(NamedTuple):
    """The token drawn for each sequence, and its log-probs; all [B].

    tokens: int64, the ids drawn.
    logprobs: log-prob of each under softmax(logits / temperature): what every ratio uses.
    sampling_logprobs: log-prob of each under the truncated distribution that it was drawn from;
        equal to logprobs without truncation.
    """

    tokens: Tensor
    logprobs: Tensor
    sampling_logprobs: Tensor


def sample_tokens(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    impl: Impl = "auto",
) -> Sampled:
    """Draw a token for each row from softmax(logits / temperature), reproducibly.

    Gumbel-max (Maddison et al. 2014, "A* Sampling", section 2): with x a row of logits and t the
    temperature, the token is ``argmax_j (x_j / t + g_j)``, the smaller id on a tie. The noise is a
    function of (seed, position, token id) and of nothing else, and the same in every
    implementation::

        (c0, c1, c2, c3) = Philox4x32-10(counter = (j // 4, position mod 2^32, 0, 0),
                                         key = (seed mod 2^32, seed div 2^32))
        r = c[j % 4]
        v = min(float32(max(r, 1)) * 2^-32, 1 - 2^-24)      in float32, rounding to nearest
        g = -log(-log1p(-v))                                in float32; -2.9 < g < 22.2

    (Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3; a
    negative seed or position counts by its two's complement.) v is equal to the bit everywhere, g
    and x / t to the rounding of logarithm and division. A draw therefore does not depend on the
    other rows, nor on which tokens truncation removed, as long as the one drawn survives.

    Truncation ranks tokens by x / t, the smaller id first on a tie. top_k keeps the first k. Then
    top_p keeps the first n, for the smallest n >= 1 whose mass, in the distribution renormalised
    over what top_k kept, is at least top_p (Holtzman et al. 2020, section 3.1). Masses are added in
    float64, each of them computed in float64 in the reference and in the dtype of the results in
    C++; in Triton, all of it is in float32. The kernels may therefore decide otherwise where a sum
    equals top_p to rounding, and Triton where two logits differ by a rounding of the division: it
    ranks by x itself.

    Args:
        logits: [B, V], float32, float64, bfloat16 or float16, any strides; computed in float32
            (float64 for float64). A token of logit -inf is never drawn.
        seeds: [B] int64, one a sequence.
        positions: [B] int64, the position of the drawn token in its sequence.
        temperature: divides the logits; above 0.
        top_k: how many tokens to keep; 0, or V and more, keeps all.
        top_p: mass to keep, in (0, 1]; 1 keeps all.
        impl: "auto", "reference", or a compiled implementation (ppo_fast.ops.backends.dispatch).

    Returns:
        Sampled: tokens [B] int64 and two [B] float32 log-probs (float64 for float64 logits),
        without gradient.

    Raises:
        TypeError: logits that are not floating point; seeds or positions not int64.
        ValueError: shapes or devices that do not fit, a number out of its range, a row of logits
            with NaN, +inf, or nothing but -inf (it is named). Rows are checked on CPU tensors; on
            CUDA that would wait for the device at every token: there such a row's log-probs are
            NaN, and its token is arbitrary.
    """
    check_floating("logits", logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected [B, V] with V >= 1")
    check_int64("seeds", seeds, logits.shape[:1], logits.device)
    check_int64("positions", positions, logits.shape[:1], logits.device)
    if temperature == 0:
        raise ValueError("temperature: got 0, expected above 0; for greedy use logits.argmax(-1)")
    check_temperature(temperature)
    if top_k < 0:
        raise ValueError(f"top_k: got {top_k}, expected 0 (off) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, expected above 0 and at most 1 (off)")
    logits = logits.detach()
    chosen = choose("sample_tokens", impl, logits.device, logits.dtype).impl
    if chosen == "reference":
        drawn = reference.sample_tokens(
            logits, seeds, positions, temperature=temperature, top_k=top_k, top_p=top_p
        )
    else:
        run = library.sample_tokens[chosen]
        drawn = run(logits, seeds, positions, float(temperature), top_k, float(top_p))
    sampled = Sampled(*drawn)
    _check_rows(logits, sampled.logprobs)
    return sampled


def _check_rows(logits: Tensor, logprobs: Tensor) -> None:
    # A row without a distribution has a NaN log-prob: looking at [B] results, or their sum, is
    # enough.
    if not values_readable(logprobs) or not math.isnan(logprobs.sum().item()):
        return
    row = int(logprobs.isnan().nonzero()[0])
    if logits[row].isnan().any():
        what = "NaN"
    elif (logits[row] == -math.inf).all():
        what = "nothing but -inf"
    else:
        what = "+inf, before or after division by the temperature"
    raise ValueError(f"logits: row {row} holds {what}; expected finite numbers (or some -inf)")
