"""Settings of TRL's PPOConfig (1.12.0, the last with a PPOTrainer), as settings of ours."""

from __future__ import annotations

import math
from typing import Any

from ppo_fast.checks import TRL_NAMES

# TRL's default of each setting that has a counterpart, and the counterpart's name.
SETTINGS: dict[str, tuple[Any, str]] = {
    "learning_rate": (3e-6, "learning_rate"),
    "lr_scheduler_type": ("linear", "lr_schedule"),
    "num_ppo_epochs": (4, "num_epochs"),
    "num_mini_batches": (1, "num_minibatches"),
    "kl_coef": (0.05, "kl_penalty"),
    "kl_estimator": ("k1", "kl_estimator"),
    "cliprange": (0.2, "clip_epsilon"),
    "cliprange_value": (0.2, "value_clip"),
    "vf_coef": (0.1, "value_loss_coef"),
    "gamma": (1.0, "gamma"),
    "lam": (0.95, "gae_lambda"),
    "response_length": (53, "max_length"),
    "temperature": (0.7, "temperature"),
    "missing_eos_penalty": (None, "missing_eos_penalty"),
    "stop_token_id": (None, "stop_token_ids"),
    "adam_beta1": (0.9, "adam_betas"),
    "adam_beta2": (0.999, "adam_betas"),
    "adam_epsilon": (1e-8, "adam_eps"),
    "weight_decay": (0.0, "weight_decay"),
    "warmup_steps": (0, "lr_warmup"),
    "gradient_checkpointing": (True, "gradient_checkpointing"),
    "bf16": (True, "compute_dtype"),
    "seed": (42, "seed"),
}
# Values that ask for what the trainer does anyway; any other has no counterpart.
ONLY = {"stop_token": ("eos", None), "whiten_rewards": (False,), "max_grad_norm": (math.inf, 1.0)}
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}


def settings_from_trl(arguments: dict[str, Any], ours: set[str]) -> dict[str, Any]:
    """Return the settings of our PPOConfig for the arguments of TRL's; its defaults for the rest.

    ``ours`` are the names of our settings, which may be among the arguments.

    Raises:
        TypeError: an argument has no counterpart; it says what stands for it.
        ValueError: a value has none.
    """
    for name, value in arguments.items():
        if name in ONLY and value not in ONLY[name]:
            raise ValueError(
                f"{name}: got {value!r}; TRL's {ONLY[name][0]!r} alone can be had here"
            )
        if name not in (*ONLY, *SETTINGS, *ours):
            raise TypeError(f"PPOConfig.trl: {name!r} has no counterpart; {_instead(name)}")
    values = {name: arguments.get(name, default) for name, (default, _) in SETTINGS.items()}
    found = {ours: values[name] for name, (_, ours) in SETTINGS.items()}
    if values["lr_scheduler_type"] not in SCHEDULES:
        raise ValueError(
            f"lr_scheduler_type: got {values['lr_scheduler_type']!r}, expected one of "
            f"{', '.join(SCHEDULES)}"
        )
    if values["kl_estimator"] not in ("k1", "k3"):
        raise ValueError(f"kl_estimator: got {values['kl_estimator']!r}, TRL has 'k1' and 'k3'")
    stop, warmup = values["stop_token_id"], values["warmup_steps"]
    if warmup >= 1:  # TRL counts updates, each of which has several optimizer steps
        warmup *= values["num_ppo_epochs"] * values["num_mini_batches"]
    own = {n: v for n, v in arguments.items() if n in ours and n not in (*SETTINGS, *ONLY)}
    return (
        found
        | {
            "lr_warmup": warmup,
            "lr_schedule": SCHEDULES[values["lr_scheduler_type"]],
            "adam_betas": (values["adam_beta1"], values["adam_beta2"]),
            "missing_eos_penalty": values["missing_eos_penalty"] or 0.0,
            "stop_token_ids": () if stop is None else (stop,),
            "compute_dtype": "bfloat16" if values["bf16"] else None,
            "kl_in": "reward",
            # TRL's PPOTrainer has a max_grad_norm, and never clips by it
            "max_grad_norm": math.inf,
        }
        | own
    )


def _instead(name: str) -> str:
    known = TRL_NAMES.get(name)
    return f"use {known}" if known else "docs/migrate.md has all that do"
