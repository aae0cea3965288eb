"""Whole PPO steps of SmolLM2-135M: the works, and the sides that do them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import plain_ppo
from torch import nn

from ppo_fast import PPOConfig, PPOTrainer, ValueModel
from ppo_fast.demo.task import load_prompts

PARTS = ("rollout", "experience", "update")


def of_ids(responses: list[list[int]]) -> list[float]:
    """Return scores that cost nothing."""
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


class Plain:
    """Steps of one of plain_ppo's trainers."""

    def __init__(self, smollm2: Any, prompts: list[str], trainer: Any, new: int) -> None:
        self.ids, self.trainer, self.new = smollm2[1](prompts)["input_ids"], trainer, new

    def step(self) -> None:
        self.trainer.step(self.ids, self.new)


Step = Callable[[], None]
Make = Callable[[Any], Step]


def _prompts(count: int) -> list[str]:
    return load_prompts()[0][:count]


def _value_model(smollm2: Any) -> ValueModel:
    return ValueModel(copy.deepcopy(smollm2[0]), 576)


def _all_weights(smollm2: Any, **changes: Any) -> Step:
    options = {"learning_rate": 1e-5, "max_length": 48} | changes
    return Ours(smollm2, _prompts(4), _value_model(smollm2), **options).step


def _head(smollm2: Any, **changes: Any) -> Step:
    options = {"learning_rate": 1e-5, "max_length": 48, "critic": "head"} | changes
    return Ours(smollm2, _prompts(4), **options).step


def _sequential(smollm2: Any) -> Step:
    policy, value_model = copy.deepcopy(smollm2[0]), _value_model(smollm2)
    trainer = plain_ppo.SequentialPPO(policy, value_model, of_ids)
    return Plain(smollm2, _prompts(4), trainer, 48).step


def _top(smollm2: Any) -> Step:
    options = {"learning_rate": 1e-5, "max_length": 24, "num_layers_unfrozen": 4}
    return Ours(smollm2, _prompts(32), critic="top", **options).step


def _bottom_frozen(smollm2: Any) -> Step:
    """Make steps of the same training without a trunk: 4 layers of policy and of value model."""
    value_model = _value_model(smollm2)
    plain_ppo.freeze_bottom(value_model, value_model.base_model.model, 4)
    value_model.value_head = nn.Linear(576, 1)  # as a top has
    options = {"learning_rate": 1e-5, "max_length": 24}
    return Ours(smollm2, _prompts(32), value_model, freeze=4, **options).step


def _demo(smollm2: Any) -> Step:
    """Make steps that train as `make demo` does."""
    options = {"learning_rate": 1e-4, "max_length": 24, "num_layers_unfrozen": 4}
    return Ours(smollm2, _prompts(32), critic="head", **options).step


def _batched(smollm2: Any) -> Step:
    trainer = plain_ppo.BatchedPPO(copy.deepcopy(smollm2[0]), 4, of_ids)
    return Plain(smollm2, _prompts(32), trainer, 24).step


# Work -> side -> function from load_smollm2() to its step, a bound method; ours comes first.
SIDES: dict[str, dict[str, Make]] = {
    "a PPO step: batch 4, 48 new tokens, 4 epochs, all weights of policy and value model": {
        "ppo_fast": _all_weights,
        "one prompt at a time": _sequential,
    },
    "a PPO step in bfloat16: batch 4, 48 new tokens, 4 epochs, all weights, value model": {
        "ppo_fast": partial(_all_weights, compute_dtype="bfloat16"),
        "ours in float32": _all_weights,
    },
    "a PPO step in bfloat16: batch 4, 48 new tokens, 4 epochs, all weights, a value head": {
        "ppo_fast": partial(_head, compute_dtype="bfloat16"),
        "ours in float32": _head,
    },
    "a PPO step: batch 32, 24 new tokens, 4 epochs, k = 4, values from a top of their own": {
        "ppo_fast": _top,
        "our ordinary path, bottom frozen": _bottom_frozen,
    },
    "a PPO step: batch 32, 24 new tokens, 4 epochs, k = 4, a value head": {
        "ppo_fast": _demo,
        "a straightforward batched step": _batched,
    },
}
