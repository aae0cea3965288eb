"""Our advantages as the trainer computes them from rewards, and our policy loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from oracles.cases import Case
from torch import Tensor

from ppo_fast.config import PPOConfig
from ppo_fast.critics.baselines import Baseline, BaselineName, baseline, discounted
from ppo_fast.data.tokens import Tokens
from ppo_fast.learning.make_experience import estimate_advantages
from ppo_fast.ops import ppo_loss, whiten
from ppo_fast.rewards.shaping import normalize_groups


def advantages_of(
    name: BaselineName,
    rewards: Tensor,
    tokens: Tokens,
    samples_per_prompt: int,
    *,
    kl: Tensor | float = 0.0,
    whitened: bool = False,
) -> Tensor:
    """Return advantages [B, T] of rewards [B, T] with one of our baselines, and gamma 1.

    ``kl`` [B, T] is a penalty that tokens pay, as with ``kl_in="reward"``.
    """
    critic = Baseline(name, gamma=1.0)
    if critic.normalizes:
        rewards = normalize_groups(rewards, tokens, samples_per_prompt)
    values = discounted(baseline(rewards.sum(1), name, samples_per_prompt), tokens, gamma=1.0)
    config = PPOConfig(gamma=1.0)
    advantages, _ = estimate_advantages(rewards - kl, values, tokens, critic, config)
    return whiten(advantages, mask=tokens.response_mask) if whitened else advantages


def policy_loss(
    case: Case, advantages: Tensor, old_logprobs: Tensor, **settings: Any
) -> Callable[..., Tensor]:
    """Return our loss as a function of log-probs [B, T], and of entropies if it has a bonus."""

    def loss(logprobs: Tensor, entropy: Tensor | None = None) -> Tensor:
        return ppo_loss(
            logprobs,
            entropy=entropy,
            old_logprobs=old_logprobs,
            advantages=advantages,
            mask=case.mask,
            impl=case.impl,
            **settings,
        ).loss

    return loss
