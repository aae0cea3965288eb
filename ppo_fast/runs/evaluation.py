"""Evaluate a policy on prompts that it is not trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ppo_fast.data.examples import Example, Prompt, Stream
from ppo_fast.data.rollout import Rollout
from ppo_fast.data.scores import Scores

# Seed of the first sequence; the next ones are -2, -3, ... Seeds of the training are not negative.
EVALUATION_SEED = -1


class Evaluable(Protocol):
    """Interface of PPO that an evaluation uses."""

    def check_prompts(self, prompts: Any) -> list[Example] | Stream: ...

    def scores(self, rollout: Rollout) -> Scores: ...

    def rollout(
        self, prompts: Iterable[Any], *, samples_per_prompt: int, seeds: Tensor
    ) -> Rollout: ...


def evaluate(
    ppo: Evaluable,
    prompts: Iterable[Prompt | Example | Mapping[str, Any]],
    samples_per_prompt: int = 1,
) -> dict[str, float]:
    """Sample and score responses, always with the same seeds, which change no draw of the training.

    Args:
        ppo: a PPO or PPOTrainer.
        prompts: as ``PPO.rollout`` takes them.
        samples_per_prompt: responses to each.

    Returns:
        reward (mean), standard_error (of the mean over responses), response_length (mean, in
            tokens), finished_fraction, and the mean and deviation of each reward.
    """
    examples = ppo.check_prompts(prompts)
    if isinstance(examples, Stream):
        raise TypeError("prompts: got a stream, expected a list: an evaluation reads all of it")
    seeds = EVALUATION_SEED - torch.arange(len(examples) * samples_per_prompt, device="cpu")
    last = getattr(ppo, "last_rollout", None)
    try:
        rollout = ppo.rollout(examples, samples_per_prompt=samples_per_prompt, seeds=seeds)
    finally:
        if hasattr(ppo, "last_rollout"):
            ppo.last_rollout = last  # of the training, for methods that take texts
    scores = ppo.scores(rollout)
    totals = scores.total if scores.total.dim() == 1 else scores.total.sum(1)
    count = len(totals)
    return {
        "reward": float(totals.mean()),
        "standard_error": float(totals.std() / count**0.5) if count > 1 else 0.0,
        "response_length": float(rollout.tokens.response_lengths.float().mean()),
        "finished_fraction": float(rollout.finished.float().mean()),
    } | scores.metrics()
