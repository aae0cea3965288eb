"""The Triton kernel of ppo_loss, and its launcher.

csrc/kernels/ppo_loss.hpp states the formulas. One pass over the tokens writes the gradients, and
the loss and the statistics of each program; reduce_partials combines the programs. Bytes moved a
token: 13, and 4 each for entropy, ref_logprobs and the gradients wanted. Saved for backward: the
gradients.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops.backends.triton_launch import Launch, kernel, launch
from ppo_fast.ops.backends.triton_reduce import (
    VEC,
    added,
    contiguous_or_none,
    empty_partials,
    larger,
    largest,
    normalizer_of,
    on_device,
    reduce_partials,
    smaller,
    smallest,
    store_column,
    tokens_end,
)
from ppo_fast.ops.kl_estimate.triton import exp_and_expm1, kl_term
from ppo_fast.ops.stats import PPO_STATS

LAUNCH = Launch(512, 4, registers=128)  # 16 bytes a thread of each input


@triton.jit
def policy_term(log_ratio, ratio, advantage, low, high, dual, log_low, log_high, log_dual):
    """The clipped objective, negated, and its derivative in log r."""
    gains = advantage >= 0.0
    log_floor = tl.where(gains, float("-inf"), log_low)
    log_ceiling = tl.where(gains, log_high, log_dual)
    capped = tl.where(log_ratio > log_ceiling, tl.where(gains, high, dual), ratio)
    loss = -advantage * tl.where(log_ratio < log_floor, low, capped)
    # Asked like this, a NaN has no slope, as under torch.clamp.
    active = (log_ratio >= log_floor) & (log_ratio <= log_ceiling)
    return loss, tl.where(active, loss, 0.0)


@kernel
def ppo_loss_kernel(
    logprobs,  # float32 [N], as all of the inputs
    entropy,  # or None
    old_logprobs,
    advantages,
    ref_logprobs,  # or None
    mask,  # bool [N]
    lengths,  # int64 [B], valid tokens of a row, where its loss is their mean; else None
    normalizer,  # float32 [1], or None: normalizer_number
    grad_logprobs,  # out, float32 [N], or None
    grad_entropy,  # out, float32 [N], or None
    partials,  # out, float32 [1 + K, P]: the loss before the normalizer, and PPO_STATS
    num_tokens: tl.int64,
    num_steps: tl.int64,
    low: tl.float32,
    high: tl.float32,
    dual: tl.float32,
    log_low: tl.float32,
    log_high: tl.float32,
    log_dual: tl.float32,
    kl_coef: tl.float32,
    entropy_coef: tl.float32,
    normalizer_number: tl.float32,
    KL_ESTIMATOR: tl.constexpr,
    KL_IN_LOSS: tl.constexpr,  # what is not in it may be inf
    ENTROPY_IN_LOSS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Inputs are masked, not results: under the mask r = 1."""
    end = tokens_end(num_tokens, ALIGNED)
    parts = normalizer_of(normalizer, normalizer_number)
    sums = (tl.zeros([BLOCK // VEC], tl.float32),) * 12
    ratio_min = tl.full([BLOCK], float("inf"), tl.float32)
    ratio_max = tl.full([BLOCK], float("-inf"), tl.float32)
    farthest = ratio_max
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, end, stride):
        token = first + tl.arange(0, BLOCK)
        exists = token < end
        valid = tl.load(mask + token, mask=exists, other=0) != 0
        new = tl.load(logprobs + token, mask=exists, other=0.0)
        old = tl.load(old_logprobs + token, mask=exists, other=0.0)
        a = tl.where(valid, tl.load(advantages + token, mask=exists, other=0.0), 0.0)
        log_ratio = tl.where(valid, new - old, 0.0)
        ratio, ratio_m1 = exp_and_expm1(log_ratio)
        policy, slope = policy_term(
            log_ratio, ratio, a, low, high, dual, log_low, log_high, log_dual
        )
        loss = policy
        d = tl.zeros([BLOCK], tl.float32)
        kl = d
        h = d
        if ref_logprobs is not None:
            ref = tl.load(ref_logprobs + token, mask=exists, other=0.0)
            d = tl.where(valid, new - ref, 0.0)
            kl, kl_slope = kl_term(d, KL_ESTIMATOR)
            if KL_IN_LOSS:
                loss += kl_coef * kl
                slope += kl_coef * kl_slope
        if entropy is not None:
            h = tl.where(valid, tl.load(entropy + token, mask=exists, other=0.0), 0.0)
            if ENTROPY_IN_LOSS:
                loss -= entropy_coef * h
        if lengths is None:
            weight = 1.0 / parts
        else:
            length = tl.load(lengths + token // num_steps, mask=exists, other=1).to(tl.float32)
            length = tl.maximum(length, 1.0)
            loss /= length
            weight = 1.0 / (parts * length)
        if grad_logprobs is not None:
            tl.store(grad_logprobs + token, tl.where(valid, slope * weight, 0.0), mask=exists)
        if grad_entropy is not None:
            bonus = -entropy_coef * weight
            tl.store(grad_entropy + token, tl.where(valid, bonus, 0.0), mask=exists)

        clipped_high = (a > 0.0) & (log_ratio > log_high)
        clipped_low = (a < 0.0) & (log_ratio < log_low)
        dual_clipped = (a < 0.0) & (log_ratio > log_dual)
        counted = tl.where(valid, ratio, 0.0)
        k3 = ratio_m1 - log_ratio
        # The loss, and the sums of PPO_STATS in their order.
        clipped = (clipped_high, clipped_low, dual_clipped)
        terms = (loss, valid, policy, kl, d, h, -log_ratio, k3) + clipped + (counted,)  # noqa: RUF005
        sums = added(sums, terms)
        ratio_min = smaller(ratio_min, ratio, valid)
        ratio_max = larger(ratio_max, ratio, valid)
        farthest = larger(farthest, tl.abs(log_ratio), valid)
    extrema = (smallest(ratio_min), largest(ratio_max), largest(farthest))
    store_column(partials, sums, extrema)


def ppo_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl_coef: float | Tensor,
    kl_estimator: str,
    entropy_coef: float | Tensor,
    aggregation: str,
    normalizer: float | Tensor | None,
    num_gradients: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same as cpp.ppo_loss on a GPU, in float32."""
    device, num_tokens = logprobs.device, logprobs.numel()
    mask = mask.contiguous()
    lengths = mask.sum(-1) if aggregation == "seq-mean-token-mean" else None
    if normalizer is None:
        normalizer = mask.sum() if lengths is None else (lengths > 0).sum()
    normalizer, number = on_device(normalizer, device)
    gradients = torch.empty(num_gradients, *logprobs.shape, dtype=torch.float32, device=device)
    partials = empty_partials(num_tokens, LAUNCH, PPO_STATS, device)
    dual = math.inf if dual_clip is None else dual_clip
    kl_coef, entropy_coef = float(kl_coef), float(entropy_coef)
    launch(
        ppo_loss_kernel,
        partials.shape[1],
        LAUNCH,
        device,
        logprobs.contiguous(),
        contiguous_or_none(entropy),
        old_logprobs.contiguous(),
        advantages.contiguous(),
        contiguous_or_none(ref_logprobs),
        mask,
        lengths,
        normalizer,
        gradients[0] if num_gradients > 0 else None,
        gradients[1] if num_gradients > 1 else None,
        partials,
        num_tokens,
        logprobs.shape[1],
        1 - clip_low,
        1 + clip_high,
        dual,
        math.log1p(-clip_low),
        math.log1p(clip_high),
        math.log(dual),
        kl_coef,
        entropy_coef,
        number,
        KL_ESTIMATOR=kl_estimator,
        KL_IN_LOSS=kl_coef != 0,
        ENTROPY_IN_LOSS=entropy_coef != 0,
        ALIGNED=num_tokens % VEC.value == 0,
    )
    return *reduce_partials(partials, PPO_STATS, normalizer, number), gradients
