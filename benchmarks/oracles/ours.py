"""Our advantages as the trainer computes them from scores, and our policy loss."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from oracles.cases import Case
from torch import Tensor

from ppo_fast.config import PPOConfig
from ppo_fast.critics.baselines import Baseline, BaselineName, baseline, discounted
from ppo_fast.data.tokens import Tokens
from ppo_fast.learning.make_experience import estimate_advantages
from ppo_fast.ops import ppo_loss, whiten


def advantages_of(
    name: BaselineName,
    scores: Tensor,
    rewards: Tensor,
    tokens: Tokens,
    samples_per_prompt: int,
    *,
    gamma: float = 1.0,
    whitened: bool = False,
) -> Tensor:
    """Return advantages [B, T] of scores [B] and rewards [B, T] with one of our baselines."""
    config = PPOConfig(gamma=gamma)
    critic = Baseline(name, gamma)
    values = discounted(baseline(scores, name, samples_per_prompt), tokens, gamma)
    advantages, _ = estimate_advantages(rewards, values, tokens, critic, config)
    scale = critic.advantage_scale(SimpleNamespace(samples_per_prompt=samples_per_prompt), scores)
    if scale is not None:
        advantages = advantages / scale[:, None]
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
