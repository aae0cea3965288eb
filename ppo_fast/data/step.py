"""Step: what one step of PPO did."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ppo_fast.data.rollout import Rollout


@dataclass(frozen=True)
class Step:
    """What callbacks are given after a step.

    number: of steps so far, this one included.
    metrics: plain floats; see ``PPO.step``.
    rollout: what was sampled, without the trunk's activations and states, which are large.
    scores: [B] float32, the reward of each sequence before KL.
    """

    number: int
    metrics: dict[str, float]
    rollout: Rollout
    scores: Tensor
