"""verl's core_algos and its correction of the rollout's log-probs, imported without Ray."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from oracles.cases import Case
from oracles.stubs import stubbed
from torch import Tensor

with stubbed("ray", "tensordict", "hydra", "codetiming", "omegaconf", "orjson"):
    from verl.trainer.ppo import core_algos, rollout_corr_helper
    from verl.utils import torch_functional
    from verl.workers.config import ActorConfig

__all__ = ["core_algos", "rollout_corr_helper", "torch_functional"]


def actor_config(**settings: Any) -> ActorConfig:
    """Return an actor's config that needs no model."""
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **settings)


def groups(rows: int, size: int) -> np.ndarray:
    """Return the prompt's name of each row: ``size`` rows next to one another have one."""
    return np.array([f"prompt {row // size}" for row in range(rows)], dtype=object)


def outcome(estimator: str, rewards: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    """Return the advantages [B, T] of one of verl's estimators."""
    function = core_algos.get_adv_estimator_fn(estimator)
    # They write to the rewards' sums in place.
    return function(rewards.clone(), response_mask=mask, **settings)[0]


def policy_loss_of_verl(
    name: str,
    case: Case,
    advantages: Tensor,
    old_logprobs: Tensor,
    aggregation: str,
    config: ActorConfig,
    weights: Tensor | None = None,
) -> Callable[[Tensor], Tensor]:
    """Return one of verl's policy losses as a function of log-probs [B, T]."""
    function = core_algos.get_policy_loss_fn(name)

    def loss(logprobs: Tensor) -> Tensor:
        batch = (old_logprobs, logprobs, advantages, case.floats)
        return function(*batch, aggregation, config, weights)[0]

    return loss
