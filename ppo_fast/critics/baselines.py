"""Baselines: critics without weights to train."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ppo_fast.data.rollout import Rollout
from ppo_fast.data.tokens import Tokens
from ppo_fast.models.language_model import LanguageModel


class BatchBaseline:
    """Gives the mean score of the batch's other sequences as the value of every token."""

    trained = reads_states = bootstraps = False

    def __init__(self, gamma: float) -> None:
        self.module, self.gamma = nn.Module(), gamma

    def values(
        self, tokens: Tokens, states: Tensor | None = None, trunk_states: Tensor | None = None
    ) -> Tensor:
        raise NotImplementedError(
            "critic='baseline' computes values from scores: call values_of_rollout"
        )

    def values_of_rollout(
        self, rollout: Rollout, scores: Tensor, policy: LanguageModel, max_tokens: int
    ) -> Tensor:
        if len(scores) == 1:
            warnings.warn(
                "critic='baseline' with a batch of one: there is no other sequence to compare "
                "with, and nothing is learned from its score; use a larger batch or "
                "critic='head'",
                stacklevel=4,
            )
        return batch_baseline(scores, rollout.tokens, self.gamma)


def batch_baseline(scores: Tensor, tokens: Tokens, gamma: float) -> Tensor:
    """Compute the mean score of the batch's other sequences for each token: scores [B] -> [B, T].

    It is discounted to each token as a sequence's own score is, and 0 beyond a response. It is 0
    for a batch of one.

    Leave-one-out as in RLOO (Ahmadian et al. 2024, eq. 8), over the batch instead of samples of one
    prompt.
    """
    others = (scores.sum() - scores) / max(len(scores) - 1, 1) * (len(scores) > 1)
    positions = torch.arange(tokens.response_ids.shape[1], device="cpu")
    left = (tokens.response_lengths[:, None] - 1 - positions).clamp_min(0)
    discount = (gamma ** left.float()).to(scores.device)
    return (others[:, None] * discount).masked_fill(~tokens.response_mask, 0.0)
