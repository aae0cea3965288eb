"""The Triton kernels of ppo_loss, and their launcher.

csrc/kernels/ppo_loss.hpp states the formulas. One pass over the tokens writes the gradients, and
the loss and the statistics of each program; reduce_partials combines the programs. Bytes moved a
token: 13, and 4 each for entropy, ref_logprobs, weights and the gradients wanted. Where the ratio
is that of a row, a pass before it reads 9 bytes a token. Saved for backward: the gradients.
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
ROWS = Launch(512, 4, registers=40)


@kernel
def row_log_ratios_kernel(
    logprobs,  # float32 [B, T]
    old_logprobs,  # float32 [B, T]
    mask,  # bool [B, T]
    row_log_ratios,  # out, float32 [B]: of the valid tokens, the mean or the sum
    num_steps: tl.int64,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row, in a fixed order: its bits do not depend on the other rows."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    tokens = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_steps, BLOCK):
        step = first + tl.arange(0, BLOCK)
        exists = step < num_steps
        token = row * num_steps + step
        valid = tl.load(mask + token, mask=exists, other=0) != 0
        new = tl.load(logprobs + token, mask=exists, other=0.0)
        old = tl.load(old_logprobs + token, mask=exists, other=0.0)
        total += tl.where(valid, new - old, 0.0)
        tokens += valid.to(tl.float32)
    log_ratio = tl.sum(total, 0)
    if MEAN:
        log_ratio /= tl.maximum(tl.sum(tokens, 0), 1.0)
    tl.store(row_log_ratios + row, log_ratio)


@triton.jit
def clipped_term(log_ratio, ratio, advantage, low, high, dual, log_low, log_high, log_dual):
    """The clipped objective, negated, and its derivative in log r."""
    gains = advantage >= 0.0
    log_floor = tl.where(gains, float("-inf"), log_low)
    log_ceiling = tl.where(gains, log_high, log_dual)
    capped = tl.where(log_ratio > log_ceiling, tl.where(gains, high, dual), ratio)
    loss = -advantage * tl.where(log_ratio < log_floor, low, capped)
    # Asked like this, a NaN has no slope, as under torch.clamp.
    active = (log_ratio >= log_floor) & (log_ratio <= log_ceiling)
    return loss, tl.where(active, loss, 0.0)


@triton.jit
def capped_term(log_ratio, ratio, advantage, logprob, low, high, log_low, log_high):
    """The objective "cispo", negated, and its derivative in the log-prob."""
    capped = tl.where(log_ratio > log_high, high, ratio)
    slope = -advantage * tl.where(log_ratio < log_low, low, capped)
    return slope * logprob, slope


@triton.jit
def masked_term(log_ratio, ratio, advantage, log_low, log_high):
    """The objective "mask", negated, and its derivative in log r."""
    outside = (log_ratio < log_low) | (log_ratio > log_high)
    inside = (log_ratio >= log_low) & (log_ratio <= log_high)
    loss = tl.where(outside, 0.0, -advantage * ratio)
    return loss, tl.where(inside, loss, 0.0)  # a NaN has no slope, as above


@kernel
def ppo_loss_kernel(
    logprobs,  # float32 [N], as all of the inputs
    entropy,  # or None
    old_logprobs,
    advantages,
    ref_logprobs,  # or None
    weights,  # or None: all 1
    mask,  # bool [N]
    row_log_ratios,  # float32 [B], where tokens have the ratio of their row; else None
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
    OBJECTIVE: tl.constexpr,
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
        used_log = log_ratio  # those of the objective; the metrics are of the tokens' own
        used = ratio
        if row_log_ratios is not None:
            row_log = tl.load(row_log_ratios + token // num_steps, mask=exists, other=0.0)
            used_log = tl.where(valid, row_log, 0.0)
            used, _ = exp_and_expm1(used_log)
        if OBJECTIVE == "clip":
            policy, slope = clipped_term(
                used_log, used, a, low, high, dual, log_low, log_high, log_dual
            )
        elif OBJECTIVE == "cispo":
            logprob = tl.where(valid, new, 0.0)
            policy, slope = capped_term(used_log, used, a, logprob, low, high, log_low, log_high)
        else:
            policy, slope = masked_term(used_log, used, a, log_low, log_high)
        if weights is not None:
            w = tl.where(valid, tl.load(weights + token, mask=exists, other=0.0), 0.0)
            # One of weight 0 is 0 even where it is infinite.
            policy = tl.where(w != 0.0, policy * w, 0.0)
            slope = tl.where(w != 0.0, slope * w, 0.0)
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

        clipped_high = used_log > log_high
        clipped_low = used_log < log_low
        dual_clipped = (a < 0.0) & (used_log > log_dual)
        if OBJECTIVE == "clip":
            clipped_high &= a > 0.0
            clipped_low &= a < 0.0
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
    weights: Tensor | None,
    mask: Tensor,
    ratio: str,
    objective: str,
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
    logprobs, old_logprobs = logprobs.contiguous(), old_logprobs.contiguous()
    mask = mask.contiguous()
    row_log_ratios = None
    if ratio != "token":
        row_log_ratios = _row_log_ratios(logprobs, old_logprobs, mask, mean=ratio == "sequence")
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
        logprobs,
        contiguous_or_none(entropy),
        old_logprobs,
        advantages.contiguous(),
        contiguous_or_none(ref_logprobs),
        contiguous_or_none(weights),
        mask,
        row_log_ratios,
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
        OBJECTIVE=objective,
        KL_ESTIMATOR=kl_estimator,
        KL_IN_LOSS=kl_coef != 0,
        ENTROPY_IN_LOSS=entropy_coef != 0,
        ALIGNED=num_tokens % VEC.value == 0,
    )
    return *reduce_partials(partials, PPO_STATS, normalizer, number), gradients


def _row_log_ratios(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, mean: bool) -> Tensor:
    num_rows, num_steps = logprobs.shape
    result = torch.empty(num_rows, dtype=torch.float32, device=logprobs.device)
    launch(
        row_log_ratios_kernel,
        num_rows,
        ROWS,
        logprobs.device,
        logprobs,
        old_logprobs,
        mask,
        result,
        num_steps,
        MEAN=mean,
    )
    return result
