"""Small rollouts whose responses end early, at lengths of their own."""

from __future__ import annotations

import torch
from tiny_models import PAD_ID

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.rollout import Rollout, Sampling, decode

# About one token in eight ends a response.
EOS_IDS = list(range(40))
PROMPTS = [[5, 61, 7, 300, 12, 8], [44], [3, 2, 91, 250], [90, 90, 90], [44], [77, 78], [44], [9]]
SEEDS = torch.arange(len(PROMPTS)) + 100


def sample(model: LanguageModel, order: list[int] | None = None, **options) -> Rollout:
    order = list(range(len(PROMPTS))) if order is None else order
    settings = {"eos_ids": EOS_IDS, "pad_id": PAD_ID, "seeds": SEEDS[order]} | options
    return decode(model, [PROMPTS[i] for i in order], Sampling(20, temperature=0.8), **settings)


def rows(per_token: torch.Tensor, rollout: Rollout) -> list[torch.Tensor]:
    lengths = rollout.tokens.response_lengths.tolist()
    return [row[:n] for row, n in zip(per_token, lengths, strict=True)]


def texts(rollout: Rollout) -> list[list[int]]:
    return [row.tolist() for row in rows(rollout.tokens.response_ids, rollout)]
