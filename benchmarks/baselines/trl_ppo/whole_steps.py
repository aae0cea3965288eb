"""The sides of whole PPO steps, ours and TRL's PPOTrainer, as in step_sides.py.

TRL has only the first mode; k = 4 trains other weights, and is not only another layout.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from step_sides import Make, Ours, Step
from trl_side import Theirs

from ppo_fast import ValueModel
from ppo_fast.demo.task import load_prompts

PROMPTS = load_prompts()[0][:4]
NEW, EPOCHS = 48, 4
OPTIONS = {"learning_rate": 1e-5, "max_length": NEW, "num_epochs": EPOCHS}


def _value_model(smollm2: Any, **options: Any) -> Step:
    value_model = ValueModel(copy.deepcopy(smollm2[0]), 576)
    return Ours(smollm2, PROMPTS, value_model, **OPTIONS | options).step


def _head(smollm2: Any) -> Step:
    return Ours(smollm2, PROMPTS, critic="head", **OPTIONS).step


def _four_layers(smollm2: Any) -> Step:
    return Ours(smollm2, PROMPTS, critic="head", num_layers_unfrozen=4, **OPTIONS).step


def _trl(smollm2: Any, **options: Any) -> Step:
    return Theirs(smollm2, PROMPTS, NEW, EPOCHS, **options).step


WORK = f"a PPO step: batch {len(PROMPTS)}, {NEW} new tokens, {EPOCHS} epochs"
APART = "ppo_fast, the same with check_gradients_together=False"
IN_BFLOAT16 = f"{WORK}, in bfloat16"
SIDES: dict[str, dict[str, Make]] = {
    WORK: {
        "ppo_fast, a value model of its own, all weights": _value_model,
        APART: partial(_value_model, check_gradients_together=False),
        "ppo_fast, a value head, all weights: no such mode in TRL": _head,
        "ppo_fast, a value head, 4 layers: not the same training": _four_layers,
        "TRL's PPOTrainer, a value model of its own, all weights": _trl,
    },
    IN_BFLOAT16: {
        "ppo_fast, a value model of its own, all weights": partial(
            _value_model, compute_dtype="bfloat16"
        ),
        "TRL's PPOTrainer, a value model of its own, all weights": partial(_trl, bf16=True),
    },
}
