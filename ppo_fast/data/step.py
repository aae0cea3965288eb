"""Step: results of one step of PPO."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ppo_fast.data.rollout import Rollout


@dataclass(frozen=True)
class Step:
    """Results of a step, for callbacks.

    number: steps so far, this one included.
    metrics: plain floats; see ``PPO.step``.
    rollout: the sampled responses, without trunk states and states, which are large.
    scores: [B] float32, the reward of each sequence before KL.
    rewards: of each reward and of each part of one, by name: [B] float32 on the CPU, before
        weights; NaN where a reward does not judge the response.
    """

    number: int
    metrics: dict[str, float]
    rollout: Rollout
    scores: Tensor
    rewards: dict[str, Tensor] = field(default_factory=dict)
