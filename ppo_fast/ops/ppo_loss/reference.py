"""The specification of ppo_loss in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ppo_fast.ops.kl_estimate.reference import kl_estimate
from ppo_fast.ops.stats import PPO_STATS, pack_stats

Bounds = tuple[float, float, float]


def ppo_loss(
    logprobs: Tensor,
    *,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    ratio: str,
    objective: str,
    clip: tuple[float, float],
    dual_clip: float | None,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    aggregation: str,
    normalizer: float | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute (loss [], metrics [K] as in PPO_STATS) from tensors [B, T]; formulas: see api.py."""
    dtype = torch.promote_types(logprobs.dtype, torch.float32)

    def valid(x: Tensor) -> Tensor:
        return torch.where(mask, x.to(dtype), 0)

    new, advantages = valid(logprobs), valid(advantages.detach())
    log_ratio = new - valid(old_logprobs.detach())
    used = log_ratio if ratio == "token" else _of_sequence(log_ratio, mask, ratio)
    bounds = _log_bounds(clip, dual_clip)
    if weights is None:
        policy = _policy_loss(objective, used, advantages, new, bounds)
    else:
        weights = valid(weights.detach())
        # Nothing of a token of weight 0 counts: 0 * inf would be NaN.
        x, a, lp = (torch.where(weights != 0, x, 0) for x in (used, advantages, new))
        policy = weights * _policy_loss(objective, x, a, lp, bounds)
    per_token = policy
    stats = _ratio_stats(log_ratio, mask) | _clip_counts(objective, used, advantages, bounds)
    stats["policy_loss"] = policy.sum()

    zero = torch.zeros((), dtype=dtype, device=logprobs.device)
    stats["kl_loss"] = stats["ref_kl"] = stats["entropy"] = zero
    if ref_logprobs is not None:
        ref = valid(ref_logprobs.detach())
        kl = kl_estimate(new, ref, mask=mask, estimator=kl_estimator)
        stats["kl_loss"], stats["ref_kl"] = kl.sum(), (new - ref).sum()
        if kl_coef > 0:
            per_token = per_token + kl_coef * kl
    if entropy is not None:
        entropy = valid(entropy)
        stats["entropy"] = entropy.sum()
        if entropy_coef != 0:
            per_token = per_token - entropy_coef * entropy
    return _aggregate(per_token, mask, aggregation, normalizer), pack_stats(PPO_STATS, stats)


def _of_sequence(log_ratio: Tensor, mask: Tensor, ratio: str) -> Tensor:
    """Return the log-ratio of each token's sequence, with the derivatives of the token's own."""
    total = log_ratio.detach().sum(-1, keepdim=True)
    if ratio == "sequence":
        total = total / mask.sum(-1, keepdim=True).clamp(min=1)
    # 0 with a derivative of 1; not inf - inf where a ratio is infinite
    zero = torch.where(log_ratio.isfinite(), log_ratio - log_ratio.detach(), 0)
    return torch.where(mask, total + zero, 0)


def _log_bounds(clip: tuple[float, float], dual_clip: float | None) -> Bounds:
    """Return the bounds of log r: low, high, dual."""
    low, high = clip
    return (
        math.log1p(-low),
        math.log1p(high),
        math.inf if dual_clip is None else math.log(dual_clip),
    )


def _policy_loss(
    objective: str, log_ratio: Tensor, advantages: Tensor, logprobs: Tensor, bounds: Bounds
) -> Tensor:
    """Compute the negated objective per token, [B, T].

    Clip: for A >= 0, min(r A, clamp(r) A) = A min(r, 1 + high); for A < 0 it is A max(r, 1 - low),
    and with dual clip A min(max(r, 1 - low), c). Clamping log r instead of r keeps exp of a clipped
    token finite, so that its gradient is 0 and not 0 * inf.
    """
    low, high, dual = bounds
    if objective == "cispo":
        return -advantages * torch.exp(log_ratio.detach().clamp(low, high)) * logprobs
    if objective == "mask":
        outside = (log_ratio < low) | (log_ratio > high)
        return torch.where(outside, 0, -advantages * torch.exp(_clamp(log_ratio, low, high)))
    gain = _clamp(log_ratio, -math.inf, high)
    harm = _clamp(log_ratio, low, dual)
    return -advantages * torch.exp(torch.where(advantages >= 0, gain, harm))


def _clamp(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp x, with gradient 1 on a bound (torch.clamp's is 0 there since PyTorch 2.14)."""
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


def _aggregate(
    per_token: Tensor, mask: Tensor, aggregation: str, normalizer: float | Tensor | None
) -> Tensor:
    lengths = mask.sum(-1)
    count: float | Tensor
    if aggregation == "seq-mean-token-mean":
        total = (per_token.sum(-1) / lengths.clamp(min=1)).sum()
        count = (lengths > 0).sum() if normalizer is None else normalizer
    else:
        total = per_token.sum()
        count = lengths.sum() if normalizer is None else normalizer
    if isinstance(count, Tensor):
        count = count.detach().masked_fill(count == 0, 1).to(total.dtype)
    return total / count


def _clip_counts(
    objective: str, log_ratio: Tensor, advantages: Tensor, bounds: Bounds
) -> dict[str, Tensor]:
    low, high, dual = bounds
    above, below = log_ratio > high, log_ratio < low
    if objective == "clip":
        above, below = above & (advantages > 0), below & (advantages < 0)
    return {
        "clipped_high": above.sum(),
        "clipped_low": below.sum(),
        "dual_clipped": ((advantages < 0) & (log_ratio > dual)).sum(),
    }


@torch.no_grad()
def _ratio_stats(log_ratio: Tensor, mask: Tensor) -> dict[str, Tensor]:
    ratio = log_ratio.exp()

    def pad(x: Tensor, neutral: float) -> Tensor:
        # One neutral element is added: torch has no minimum or maximum of an empty tensor.
        return F.pad(torch.where(mask, x, neutral).flatten(), (0, 1), value=neutral)

    return {
        "tokens": mask.sum(),
        "approx_kl": (-log_ratio).sum(),
        "approx_kl_k3": (torch.expm1(log_ratio) - log_ratio).sum(),
        "ratio": torch.where(mask, ratio, 0).sum(),
        "ratio_min": pad(ratio, math.inf).amin(),
        "ratio_max": pad(ratio, -math.inf).amax(),
        "max_log_ratio": pad(log_ratio.abs(), -math.inf).amax(),
    }
