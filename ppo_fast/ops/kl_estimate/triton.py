"""The Triton kernel of kl_estimate, and its launcher.

csrc/kernels/kl_estimate.hpp states the formulas. Bytes moved a token: 12, and 4 for the
slope and 1 for the mask. Saved for backward: the slope.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops.backends.triton_launch import Launch, kernel, launch
from ppo_fast.ops.backends.triton_reduce import VEC, contiguous_or_none, tokens_end

LAUNCH = Launch(1024, 8, registers=40)  # 16 bytes a thread

EXP_LOWEST = tl.constexpr(-87.3365447)  # log of the smallest normal number
EXP_HIGHEST = tl.constexpr(88.7228394)  # log of the largest number
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: a sum with it has no places after the dot
ROUNDER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def power_of_two(n):
    """2^n for -126 <= n <= 127."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp_and_expm1(x):
    """As csrc/base/math.hpp: exact to 2 ulp, also next to 0 and where exp2(x log2(e)) is not."""
    bounded = tl.where(x < EXP_LOWEST, EXP_LOWEST, x)
    bounded = tl.where(bounded > EXP_HIGHEST, EXP_HIGHEST, bounded)
    # x = n log 2 + r with |r| <= log(2) / 2, log 2 in two parts.
    shifted = bounded * 1.4426950408889634 + ROUNDER
    n = shifted.to(tl.int32, bitcast=True) - ROUNDER_BITS
    whole = shifted - ROUNDER
    r = (bounded - whole * 0.693359375) + whole * 2.12194440e-4
    p = 1.3926213141530752e-3
    p = p * r + 8.363203145563602e-3
    p = p * r + 4.1666556149721146e-2
    p = p * r + 0.16666576266288757
    p = p * r + 0.5
    p = r * r * p + r
    half = n >> 1  # 2^128 is no float: in two factors
    first = power_of_two(half)
    second = power_of_two(n - half)
    exp = (p * first + first) * second
    exp = tl.where(x < EXP_LOWEST, 0.0, tl.where(x > EXP_HIGHEST, float("inf"), exp))
    scale = first * second
    # Above 25 the 1 is lost in the rounding of exp.
    return exp, tl.where(x > 25.0, exp, p * scale + (scale - 1.0))


@triton.jit
def kl_term(d, ESTIMATOR: tl.constexpr):
    """An estimate from d = log pi - log ref, and its derivative in d."""
    if ESTIMATOR == "k1":
        return d, tl.full(d.shape, 1.0, tl.float32)
    elif ESTIMATOR == "abs":
        sign = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, 0.0))
        return tl.abs(d), sign
    elif ESTIMATOR == "k2":
        return 0.5 * d * d, d
    elif ESTIMATOR == "k3":
        _, e = exp_and_expm1(-d)
        return e + d, -e
    elif ESTIMATOR == "k3 clamped":
        d = tl.where(d < -20.0, -20.0, tl.where(d > 20.0, 20.0, d))
        _, e = exp_and_expm1(-d)
        kl = e + d
        return tl.where(kl > 10.0, 10.0, kl), tl.where(kl > 10.0, 0.0, -e)
    else:  # k1+k2
        return d, d


@kernel
def kl_estimate_kernel(
    logprobs,  # float32 [N]
    ref_logprobs,  # float32 [N]
    mask,  # bool [N], or None
    estimate,  # out, float32 [N]
    slope,  # out, float32 [N]: the derivative in logprobs; untouched without SLOPE
    num_tokens: tl.int64,
    ESTIMATOR: tl.constexpr,
    SLOPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a block of tokens."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = token < tokens_end(num_tokens, ALIGNED)
    d = tl.load(logprobs + token, mask=exists, other=0.0)
    d -= tl.load(ref_logprobs + token, mask=exists, other=0.0)
    if mask is not None:
        d = tl.where(tl.load(mask + token, mask=exists, other=0) != 0, d, 0.0)
    kl, kl_slope = kl_term(d, ESTIMATOR)
    tl.store(estimate + token, kl, mask=exists)
    if SLOPE:
        tl.store(slope + token, kl_slope, mask=exists)


def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimator: str, with_slope: bool
) -> tuple[Tensor, Tensor]:
    """Compute the same as cpp.kl_estimate on a GPU, in float32."""
    shape, device, num_tokens = logprobs.shape, logprobs.device, logprobs.numel()
    estimate = torch.empty(shape, dtype=torch.float32, device=device)
    slope = torch.empty(shape if with_slope else 0, dtype=torch.float32, device=device)
    launch(
        kl_estimate_kernel,
        triton.cdiv(num_tokens, LAUNCH.block),
        LAUNCH,
        device,
        logprobs.contiguous(),
        ref_logprobs.contiguous(),
        contiguous_or_none(mask),
        estimate,
        slope,
        num_tokens,
        ESTIMATOR=estimator,
        SLOPE=with_slope,
        ALIGNED=num_tokens % VEC.value == 0,
    )
    return estimate, slope
