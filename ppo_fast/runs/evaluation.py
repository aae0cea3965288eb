"""Evaluate a policy on prompts that it is not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ppo_fast.data.examples import Example
from ppo_fast.data.rollout import Rollout
from ppo_fast.rewards.scorer import Scorer

EVALUATION_SEED = 1 << 40  # of the first sequence: far from the draws of the training


class Evaluable(Protocol):
    """Interface of PPO that an evaluation uses."""

    scorer: Scorer

    def rollout(
        self, prompts: Sequence[Example], *, samples_per_prompt: int, seeds: Tensor
    ) -> Rollout: ...


def evaluate(
    ppo: Evaluable, prompts: Sequence[Example], samples_per_prompt: int = 1
) -> dict[str, float]:
    """Sample and score responses, always with the same seeds, which change no draw of the training.

    Returns:
        reward (mean), standard_error (of the mean over responses), response_length (mean, in
            tokens), finished_fraction, and the mean and deviation of each reward.
    """
    seeds = EVALUATION_SEED + torch.arange(len(prompts) * samples_per_prompt, device="cpu")
    rollout = ppo.rollout(prompts, samples_per_prompt=samples_per_prompt, seeds=seeds)
    scores = ppo.scorer.of_rollout(rollout)
    totals = scores.total if scores.total.dim() == 1 else scores.total.sum(1)
    count = len(totals)
    return {
        "reward": float(totals.mean()),
        "standard_error": float(totals.std() / count**0.5) if count > 1 else 0.0,
        "response_length": float(rollout.tokens.response_lengths.float().mean()),
        "finished_fraction": float(rollout.finished.float().mean()),
    } | scores.metrics()
