"""Batches for the tests of ppo_loss, and the papers' formulas token by token in float64."""

from __future__ import annotations

import math

import pytest
import torch
from runnable import FLOATS, WIDE, generator, implementations

from ppo_fast.ops.ppo_loss import ppo_loss
from ppo_fast.ops.stats import PPO_STATS

TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 3e-6}
DTYPES = [dtype for dtype in TOLERANCE if dtype in FLOATS]
AGGREGATIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "token-sum"]
RATIOS = ["token", "sequence", "sequence-product"]
OBJECTIVES = ["clip", "cispo", "mask"]
EVERYTHING = {
    "clip": (0.2, 0.3),
    "dual_clip": 2.0,
    "kl_coef": 0.3,
    "kl_estimator": "k3",
    "entropy_coef": 0.1,
}

# Value and slope of the KL estimators in d = logprobs - ref_logprobs.
KL = {
    "k1": lambda d: (d, 1.0),
    "abs": lambda d: (abs(d), float((d > 0) - (d < 0))),
    "k2": lambda d: (d * d / 2, d),
    "k3": lambda d: (math.exp(-d) - 1 + d, 1 - math.exp(-d)),
    "k1+k2": lambda d: (d, d),
}

each_impl = pytest.mark.parametrize("impl", implementations("ppo_loss"))
each_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS)


def batch(seed=0, B=3, T=5, dtype=WIDE, valid=0.7, scale=0.5, offset=-1.0, weighted=False):
    """Return the tensors of a call; with ``weighted``, weights of 0 to 1.8 too."""
    g = generator(seed)
    x = torch.randn(5, B, T, generator=g, dtype=torch.float64)
    logprobs = (offset + x[0]).to(dtype).requires_grad_()
    weights = (2 * torch.rand(B, T, generator=g) - 0.2).clamp(min=0).to(dtype)
    return {
        "logprobs": logprobs,
        "old_logprobs": (logprobs.detach() + scale * x[1]).to(dtype),
        "ref_logprobs": (logprobs.detach() + scale * x[2]).to(dtype),
        "advantages": x[3].to(dtype),
        "entropy": x[4].abs().to(dtype).requires_grad_(),
        "mask": torch.rand(B, T, generator=g) < valid,
    } | ({"weights": weights} if weighted else {})


def default_normalizer(mask, aggregation):
    per_sequence = [sum(row) for row in mask.tolist()]
    if aggregation == "token-sum":
        return 1
    if aggregation == "seq-mean-token-mean":
        return max(sum(n > 0 for n in per_sequence), 1)
    return max(sum(per_sequence), 1)


def used_log_ratio(tensors, b, t, ratio):
    """Return the log-ratio of the token, or that of its sequence."""
    new, old, mask = (tensors[x][b].tolist() for x in ("logprobs", "old_logprobs", "mask"))
    log_ratios = [x - y for x, y in zip(new, old, strict=True)]
    of_sequence = [x for x, valid in zip(log_ratios, mask, strict=True) if valid]
    total = sum(of_sequence)
    return {
        "token": log_ratios[t],
        "sequence": total / len(of_sequence),
        "sequence-product": total,
    }[ratio]


def policy_objective(objective, ratio, adv, logprob, clip, dual_clip):
    """Return the objective of a token, its derivative in the log-prob, and what counts as clipped.

    The ratio's derivative in the log-prob is the ratio.
    """
    lowest, highest = 1 - clip[0], 1 + clip[1]
    clamped = min(max(ratio, lowest), highest)
    outside = ["clipped_low"] * (ratio < lowest) + ["clipped_high"] * (ratio > highest)
    if objective == "cispo":  # MiniMax-M1, eq. 4-5
        return clamped * adv * logprob, clamped * adv, outside
    if objective == "mask":
        return (0.0, 0.0, outside) if outside else (ratio * adv, ratio * adv, [])
    result, slope, clipped = ratio * adv, ratio * adv, []
    if clamped * adv < result:  # Schulman et al. 2017, eq. 7
        result, slope = clamped * adv, 0.0
        clipped.append("clipped_high" if adv > 0 else "clipped_low")
    if dual_clip is not None and adv < 0 and result < dual_clip * adv:  # Ye 2020, eq. 5
        result, slope = dual_clip * adv, 0.0
        clipped.append("dual_clipped")
    return result, slope, clipped


def truth(
    tensors,
    *,
    clip,
    dual_clip,
    kl_coef,
    kl_estimator,
    entropy_coef,
    aggregation,
    normalizer,
    ratio="token",
    objective="clip",
):
    """Compute (loss, dlogprobs, dentropy, stats, size of the summed terms) as in the papers."""
    mask = tensors["mask"]
    normalizer = normalizer or default_normalizer(mask, aggregation)
    loss, size = 0.0, 1.0
    dlogprobs, dentropy = torch.zeros(2, *mask.shape, dtype=torch.float64)
    neutral = {"sum": 0.0, "min": math.inf, "max": -math.inf}
    stats = {name: neutral[reduction] for name, reduction in PPO_STATS.items()}
    for b, t in mask.nonzero().tolist():
        x = {name: tensor[b, t].item() for name, tensor in tensors.items()}
        log_ratio = x["logprobs"] - x["old_logprobs"]
        used = math.exp(used_log_ratio(tensors, b, t, ratio))
        policy, slope, clipped = policy_objective(
            objective, used, x["advantages"], x["logprobs"], clip, dual_clip
        )
        for name in clipped:
            stats[name] += 1
        policy, slope = (x.get("weights", 1.0) * y for y in (policy, slope))
        own = math.exp(log_ratio)
        d = x["logprobs"] - x["ref_logprobs"]
        kl, kl_slope = KL[kl_estimator](d)

        weight = 1 / normalizer
        if aggregation == "seq-mean-token-mean":
            weight /= sum(mask[b].tolist())
        loss += weight * (-policy + kl_coef * kl - entropy_coef * x["entropy"])
        dlogprobs[b, t] = weight * (-slope + kl_coef * kl_slope)
        dentropy[b, t] = -weight * entropy_coef
        size += abs(policy) + (1 + kl_coef) * (abs(kl) + abs(d)) + own + x["entropy"]

        stats["tokens"] += 1
        stats["policy_loss"] -= policy
        stats["kl_loss"] += kl
        stats["ref_kl"] += d
        stats["entropy"] += x["entropy"]
        stats["approx_kl"] -= log_ratio
        stats["approx_kl_k3"] += own - 1 - log_ratio
        stats["ratio"] += own
        stats["ratio_min"] = min(stats["ratio_min"], own)
        stats["ratio_max"] = max(stats["ratio_max"], own)
        stats["max_log_ratio"] = max(stats["max_log_ratio"], abs(log_ratio))
    return loss, dlogprobs, dentropy, [stats[name] for name in PPO_STATS], size


def run_all(tensors, **options):
    """Return loss, metrics and both gradients of one call."""
    leaves = [tensors[k].detach().requires_grad_() for k in ("logprobs", "entropy")]
    tensors = {**tensors, "logprobs": leaves[0], "entropy": leaves[1]}
    out = ppo_loss(**tensors, **options)
    return out.loss.detach(), out.metrics, *torch.autograd.grad(-1.7 * out.loss, leaves)
