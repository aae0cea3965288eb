"""The work of the ops in plain PyTorch, without ppo_fast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Logprobs = tuple[Tensor, Tensor] | tuple[Tensor]


def by_log_softmax(logits: Tensor, labels: Tensor, entropy: bool) -> Logprobs:
    log_p = logits.log_softmax(-1)
    logprobs = log_p.gather(-1, labels[:, None])[:, 0]
    return (logprobs, -(log_p.exp() * log_p).sum(-1)) if entropy else (logprobs,)


def by_logsumexp(logits: Tensor, labels: Tensor, entropy: bool) -> Logprobs:
    lse = logits.logsumexp(-1)
    logprobs = logits.gather(-1, labels[:, None])[:, 0] - lse
    return (logprobs, lse - (logits.softmax(-1) * logits).sum(-1)) if entropy else (logprobs,)


def by_cross_entropy(logits: Tensor, labels: Tensor, entropy: bool) -> Logprobs:
    """Compute the entropy by a product of vectors, so that p * x is never stored."""
    logprobs = -F.cross_entropy(logits, labels, reduction="none")
    if not entropy:
        return (logprobs,)
    mean = (logits.softmax(-1)[:, None] @ logits[:, :, None])[:, 0, 0]
    return logprobs, logits.logsumexp(-1) - mean


LOGPROBS = {
    "eager, log_softmax and gather": by_log_softmax,
    "eager, gather and logsumexp": by_logsumexp,
    "eager, F.cross_entropy": by_cross_entropy,
}


def loop_over_steps(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Compute advantages, without masks, episode ends or a bootstrap value."""
    advantage = torch.zeros_like(rewards[:, 0])
    columns = []
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        columns.append(advantage)
    return torch.stack(columns[::-1], dim=1)


def by_multinomial(logits: Tensor) -> tuple[Tensor, Tensor]:
    p = logits.softmax(-1)
    tokens = torch.multinomial(p, 1)
    return tokens[:, 0], p.gather(-1, tokens)[:, 0].log()


def by_cumsum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Draw by the inverse of the distribution function, at one uniform number a row."""
    p = logits.softmax(-1)
    below = p.cumsum(-1)
    tokens = torch.searchsorted(below, torch.rand(len(p), 1) * below[:, -1:])
    tokens = tokens.clamp(max=p.shape[-1] - 1)
    return tokens[:, 0], p.gather(-1, tokens)[:, 0].log()


def by_exponential(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Draw the smallest of exponential waiting times, as inference engines do."""
    p = logits.softmax(-1)
    tokens = (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)
    return tokens[:, 0], p.gather(-1, tokens)[:, 0].log()


SAMPLE = {
    "softmax, torch.multinomial, gather": by_multinomial,
    "softmax, cumsum, searchsorted": by_cumsum,
    "softmax / exponential, argmax": by_exponential,
}


def top_k_by_multinomial(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    largest, ids = logits.topk(k, dim=-1)
    drawn, logprobs = by_multinomial(largest)
    return ids.gather(-1, drawn[:, None])[:, 0], logprobs


def top_p_by_multinomial(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    falling, ids = logits.sort(dim=-1, descending=True)
    p = falling.softmax(-1)
    cut = falling.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)
    drawn, logprobs = by_multinomial(cut)
    return ids.gather(-1, drawn[:, None])[:, 0], logprobs


def losses(
    logprobs: Tensor,
    entropy: Tensor,
    values: Tensor,
    *,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
) -> Tensor:
    """Compute policy and value loss with the terms of test_bench_losses.py, without any metric."""
    ratio = (logprobs - old_logprobs).exp()
    policy = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    policy = torch.where(advantages < 0, torch.max(policy, 3.0 * advantages), policy)
    log_ratio = logprobs - ref_logprobs
    k2 = 0.5 * log_ratio**2
    kl = log_ratio.detach() + k2 - k2.detach()
    clipped = old_values + (values - old_values).clamp(-0.2, 0.2)
    value = 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)
    terms = -policy + 0.05 * kl - 0.01 * entropy + value
    return (terms * mask).sum() / mask.sum()
