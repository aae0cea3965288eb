"""Evaluated: results of one evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from ppo_fast.data.rollout import Rollout
from ppo_fast.data.scores import Scores


@dataclass(frozen=True)
class Evaluated:
    """Results of an evaluation, for callbacks.

    step: steps of PPO done; 0: before training.
    metrics: plain floats: reward, standard_error and others; see ``ppo_fast.evaluate``.
    rollout: the sampled responses.
    scores: of the rewards.
    """

    step: int
    metrics: dict[str, float]
    rollout: Rollout
    scores: Scores
