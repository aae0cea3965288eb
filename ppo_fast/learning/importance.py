"""Weights and metrics for tokens that were drawn from another distribution than the policy's.

Another engine, truncated sampling and half precision draw from a distribution that differs from the
one that the update computes. Legend: B sequences, T response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.config import Importance

MAX_LOG_RATIO = 20.0  # exp of a larger one overflows in sums of squares


def importance_weights(
    log_ratios: Tensor, mask: Tensor, kind: Importance, bounds: tuple[float, float]
) -> Tensor:
    """Compute the weights [B, T] of tokens, 0 where the mask is False.

    With w = exp(log_ratios), bounds = (low, high), and means and products over a sequence's tokens:

    - "truncate": clamp(w, low, high) (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings
      You Off-Policy RL Training")
    - "mask": w where low <= w <= high, else 0 (IcePop, Ling team 2025)
    - "sequence-mask": w where low <= geometric mean of w <= high, else 0 for the whole sequence
    - "sequence-truncate": clamp(product of w, low, high) for all tokens of a sequence

    Args:
        log_ratios: [B, T], log-probs under the policy minus those of the sampler.
        mask: [B, T] bool, tokens that are trained on.
        kind, bounds: see above.
    """
    low, high = bounds
    log_ratios = log_ratios.masked_fill(~mask, 0.0)
    bounded = log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    weights = bounded.exp()
    if kind == "truncate":
        weights = weights.clamp(low, high)
    elif kind == "mask":
        weights = weights * ((weights >= low) & (weights <= high))
    elif kind == "sequence-mask":
        mean = (bounded.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)).exp()
        weights = weights * ((mean >= low) & (mean <= high))
    else:
        total = log_ratios.sum(1, keepdim=True)  # of all, however far: it is bounded afterwards
        product = total.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        weights = product.clamp(low, high).expand_as(weights)
    return weights.masked_fill(~mask, 0.0)


def mismatch_metrics(log_ratios: Tensor, mask: Tensor) -> dict[str, float]:
    """Return how far the sampler's distribution is from the policy's.

    Args:
        log_ratios: [B, T], log-probs under the policy minus those of the sampler.
        mask: [B, T] bool, tokens that are trained on.

    Returns:
        sampling_log_ratio_max (the largest size of a log-ratio), sampling_kl (k1 of KL(sampler ||
            policy): minus the mean log-ratio), sampling_kl_k3 (the mean of w - 1 - log w),
            effective_sample_size (sum(w)^2 / sum(w^2), divided by the number of tokens: 1 where all
            weights are equal).
    """
    ratios = log_ratios[mask]
    if not ratios.numel():
        return {}
    bounded = ratios.double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    weights = bounded.exp()
    return {
        "sampling_log_ratio_max": float(ratios.abs().max()),
        "sampling_kl": -float(ratios.mean()),
        "sampling_kl_k3": float((torch.expm1(bounded) - bounded).mean()),
        "effective_sample_size": float(weights.sum() ** 2 / weights.square().sum() / len(weights)),
    }


def highest(values: Tensor, mask: Tensor, share: float) -> Tensor:
    """Return [B, T] bool: the ``share`` of the masked tokens whose values are highest.

    Ties with the lowest of them are chosen too.
    """
    chosen = values[mask]
    if not chosen.numel():
        return mask
    count = max(round(share * chosen.numel()), 1)
    threshold = chosen.kthvalue(chosen.numel() - count + 1).values
    return mask & (values >= threshold)
