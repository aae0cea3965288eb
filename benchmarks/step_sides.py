"""Whole PPO steps of SmolLM2-135M: our side of them."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import plain_ppo
from torch import nn

from ppo_fast import PPOConfig, PPOTrainer

PARTS = ("rollout", "experience", "update")


def of_ids(responses: list[list[int]]) -> list[float]:
    """A score that costs nothing."""
    return [sum(ids) % 97 / 50 for ids in responses]


def of_texts(prompts: list[str], completions: list[str]) -> list[float]:
    return [len(text) % 97 / 50 for text in completions]


class Ours:
    """Steps of a PPOTrainer; ``spent`` adds up the seconds of their parts."""

    def __init__(
        self,
        smollm2: Any,
        prompts: list[str],
        value_model: nn.Module | None = None,
        freeze: int = 0,
        **options: Any,
    ) -> None:
        model, tokenizer = smollm2
        policy = copy.deepcopy(model)
        if freeze:
            plain_ppo.freeze_bottom(policy, policy.model, freeze)
        self.trainer = PPOTrainer(
            policy, value_model, of_texts, tokenizer, "cpu", config=PPOConfig(**options)
        )
        self.trainer.engine.eos_ids = list
        self.prompts = prompts
        self.spent: Counter[str] = Counter()

    def step(self) -> None:
        metrics = self.trainer.train_step(self.prompts)
        self.spent += {part: metrics[f"time/{part}"] for part in PARTS}
