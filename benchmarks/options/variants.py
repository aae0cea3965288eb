"""Variants of a run: the settings that each changes, and what they are compared with."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ppo_fast import PPOConfig

# Of all runs, unless a variant changes them.
COMMON = {
    "learning_rate": 1e-4,
    "value_learning_rate": 1e-3,
    "kl_penalty": 0.05,
    "gamma": 1.0,
    "num_epochs": 4,
}


@dataclass(frozen=True)
class Variant:
    """A variant.

    name: as the table has it.
    settings: fields of PPOConfig.
    token_rewards: whether rewards are given for tokens, where the task has them.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    token_rewards: bool = False


def variants() -> list[Variant]:
    head = {"critic": "head"}
    k = {"num_layers_unfrozen": 2}
    # at this size: the learning rates of the other variants, half the warm-up, a larger alpha
    rates = {name: COMMON[name] for name in ("learning_rate", "value_learning_rate")}
    sao = recipe(PPOConfig.sao(critic="head"), **rates, critic_warmup_steps=5, gae_length_alpha=0.5)
    group = {"samples_per_prompt": 8, "kl_penalty": COMMON["kl_penalty"], "num_epochs": 4}
    return [
        Variant("batch mean of the others", {"critic": "baseline"}),
        Variant("value head", head),
        Variant("value model", {"critic": "model"}),
        Variant("top, 2 of 3 layers trained", {"critic": "top"} | k),
        Variant("batch mean, 2 of 3 layers trained", {"critic": "baseline"} | k),
        Variant("value head, lambda 1", head | {"gae_lambda": 1.0}),
        Variant("value head, lambda by length", head | {"gae_length_alpha": 0.5}),
        Variant("value head, targets with lambda 1", head | {"gae_lambda_value": 1.0}),
        Variant("value head, warm-up of 5 steps", head | {"critic_warmup_steps": 5}),
        Variant("value head, 8 value epochs", head | {"value_epochs": 8}),
        Variant("value head, 1 epoch", head | {"num_epochs": 1}),
        Variant("value head, KL in the loss", head | {"kl_in": "loss"}),
        Variant("value head, learning rate falls", head | {"lr_schedule": "linear"}),
        Variant("value head, target KL 0.02", head | {"target_kl": 0.02}),
        Variant("value head, rewards for tokens", head, token_rewards=True),
        Variant("batch mean, rewards for tokens", {"critic": "baseline"}, token_rewards=True),
        Variant("RLOO, 8 samples", group | {"critic": "baseline"}),
        Variant("GRPO, 8 samples", group | {"critic": "group_norm", "whiten_advantages": False}),
        Variant("Dr. GRPO, 8 samples", group | {"critic": "group_mean"}),
        Variant("GSPO, 8 samples", group | {"critic": "group_norm", "ratio": "sequence"}),
        Variant("CISPO, value head", head | {"objective": "cispo"}),
        Variant("SAO, value head", sao),
    ]


def recipe(config: PPOConfig, **changes: Any) -> dict[str, Any]:
    """Return the settings in which a preset differs from the defaults, but for ``changes``."""
    given, default = asdict(config), asdict(PPOConfig())
    return {name: x for name, x in given.items() if x != default[name]} | changes
