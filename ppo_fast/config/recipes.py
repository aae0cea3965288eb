"""Recipes: settings of published algorithms, as far as they differ from PPOConfig's defaults."""

from __future__ import annotations

from typing import Any

SAO: dict[str, Any] = {
    "learning_rate": 1e-6,
    "value_learning_rate": 5e-6,
    "kl_penalty": 0.0,
    "objective": "mask",
    "clip_epsilon": 0.8,
    "clip_epsilon_high": 3.0,
    "ratio_to": "sampler",
    "gae_lambda_value": 1.0,
    "gae_length_alpha": 0.05,
    "num_epochs": 1,
    "value_epochs": 2,
    "critic_warmup_steps": 10,
    "value_frozen": ("*attn*",),
}
RLOO: dict[str, Any] = {
    "learning_rate": 1e-6,
    "critic": "baseline",
    "samples_per_prompt": 4,
    "num_epochs": 1,
    "whiten_advantages": False,
    "aggregation": "seq-mean-token-sum",
}
GRPO: dict[str, Any] = {
    "learning_rate": 1e-6,
    "critic": "group_norm",
    "samples_per_prompt": 8,
    "num_epochs": 1,
    "kl_in": "loss",
    "kl_estimator": "k3",
    "kl_penalty": 0.04,
    "whiten_advantages": False,
    "aggregation": "seq-mean-token-mean",
}
