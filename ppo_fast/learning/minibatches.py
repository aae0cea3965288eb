"""Minibatches of an update: the numbers of their losses, and their statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.config import PPOConfig
from ppo_fast.learning.ratio_quantiles import ratio_quantiles
from ppo_fast.ops.stats import (
    PPO_STATS,
    VALUE_STATS,
    merge_stats,
    ppo_metrics,
    value_metrics,
)


class Terms(NamedTuple):
    """Numbers of an update's losses."""

    config: PPOConfig
    kl_coef: float
    entropy_coef: float
    temperature: float
    max_length: int

    def units(self, counts: Tensor) -> float:
        """Return what a minibatch's policy loss is divided by; ``counts`` [b] are its tokens."""
        return {
            "token-mean": float(counts.sum()),
            "seq-mean-token-mean": float((counts > 0).sum()),
            "seq-mean-token-sum": float(len(counts) * self.max_length),
            "token-sum": 1.0,
        }[self.config.aggregation]


@dataclass
class Found:
    """Statistics, log-ratios and losses of a minibatch's parts."""

    policy_stats: list[Tensor] = field(default_factory=list)
    value_stats: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    log_ratios: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)


@dataclass
class Done:
    """Statistics and gradient norms of an update's minibatches so far.

    log_ratios, masks: of the last epoch.
    far: whether the policy has gone beyond ``target_kl``.
    skipped: optimizer steps that were not taken, since something was not finite.
    """

    policy_stats: list[Tensor] = field(default_factory=list)
    value_stats: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    log_ratios: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    far: bool = False
    skipped: int = 0

    def add(self, found: Found, norm: Tensor | None) -> None:
        """Add a minibatch, and the norm of the policy's gradient, if the policy was changed."""
        self.policy_stats += found.policy_stats
        self.value_stats += found.value_stats
        self.log_ratios += found.log_ratios
        self.masks += found.masks
        self.norms += [] if norm is None else [norm]

    def metrics(self) -> dict[str, float]:
        """Return means over all tokens and epochs, and quantiles of the last epoch's ratios."""
        metrics = {"policy_loss": 0.0}
        if self.policy_stats:
            metrics |= ppo_metrics(merge_stats(PPO_STATS, self.policy_stats))
            metrics["first_max_log_ratio"] = ppo_metrics(self.policy_stats[0])["max_log_ratio"]
            metrics |= ratio_quantiles(self.log_ratios, self.masks)
        if self.norms:
            metrics["policy_grad_norm"] = float(torch.stack(self.norms).mean())
        if self.value_stats:
            metrics |= value_metrics(merge_stats(VALUE_STATS, self.value_stats))
        return metrics
