"""Baselines: critics without weights to train."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from ppo_fast.config.together import GROUP_CRITICS
from ppo_fast.data.rollout import Rollout
from ppo_fast.data.tokens import Tokens
from ppo_fast.data.trunk_states import TrunkStates
from ppo_fast.models.language_model import LanguageModel

BaselineName = Literal["baseline", "group_mean", "group_norm", "batch_mean"]
BASELINES: tuple[BaselineName, ...] = ("baseline", "group_mean", "group_norm", "batch_mean")


class Baseline:
    """Gives the mean score of some of the batch's sequences as the value of every token.

    Args:
        name: of which sequences: see ``baseline``.
        gamma: discount per token.
    """

    trained = reads_states = bootstraps = False
    packed = True

    def __init__(self, name: BaselineName, gamma: float) -> None:
        self.name, self.module, self.gamma = name, nn.Module(), gamma
        self.normalizes = name == "group_norm"

    def values(
        self, tokens: Tokens, states: Tensor | None = None, trunk_states: TrunkStates | None = None
    ) -> Tensor:
        raise NotImplementedError(
            f"critic={self.name!r} computes values from scores: call values_of_rollout"
        )

    def values_of_rollout(
        self, rollout: Rollout, scores: Tensor, policy: LanguageModel, max_tokens: int
    ) -> Tensor:
        if self.name in GROUP_CRITICS:
            check_groups(f"critic={self.name!r}", rollout)
        if len(scores) == 1:
            warnings.warn(
                f"critic={self.name!r} with a batch of one: there is no other sequence to compare "
                "with, and nothing is learned from its score; use a larger batch or "
                "critic='head'",
                stacklevel=4,
            )
        mean = baseline(scores, self.name, rollout.samples_per_prompt)
        return discounted(mean, rollout.tokens, self.gamma)


def check_groups(setting: str, rollout: Rollout) -> None:
    """Raise ValueError if a rollout has one sample of each prompt, where ``setting`` needs more."""
    if rollout.samples_per_prompt == 1:
        raise ValueError(
            f"{setting} compares the samples of a prompt, and the rollout has one of each; use "
            "rollout(prompts, samples_per_prompt=...), or from_tokens with it"
        )


def baseline(scores: Tensor, name: BaselineName, samples_per_prompt: int) -> Tensor:
    """Compute the score that each sequence's is compared with: [B] -> [B].

    - "baseline": the mean of the prompt's other samples (RLOO, Ahmadian et al. 2024, eq. 8); of the
      batch's other sequences where there is one sample a prompt; 0 for a batch of one
    - "group_mean", "group_norm": the mean of the prompt's samples, this one included (Dr. GRPO, Liu
      et al. 2025; GRPO, Shao et al. 2024, section 4.1.1, whose scores are normalised before)
    - "batch_mean": the mean of the batch (REINFORCE++, Hu 2025)

    The samples of a prompt are rows next to one another.
    """
    of_batch = name == "batch_mean" or (name == "baseline" and samples_per_prompt == 1)
    groups = scores[None] if of_batch else scores.view(-1, samples_per_prompt)
    total, size = groups.sum(1, keepdim=True), groups.shape[1]
    if name == "baseline":
        return ((total - groups) / max(size - 1, 1) * (size > 1)).flatten()
    return (total / size).expand_as(groups).flatten()


def discounted(values: Tensor, tokens: Tokens, gamma: float) -> Tensor:
    """Discount values [B] of a response's end to each of its tokens, [B, T]; 0 beyond it."""
    positions = torch.arange(tokens.response_ids.shape[1], device="cpu")
    left = (tokens.last_trained[:, None] - positions).clamp_min(0)
    discount = (gamma ** left.float()).to(values.device)
    return (values[:, None] * discount).masked_fill(~tokens.response_mask, 0.0)
