"""Models whose own forward enters autocast, as accelerate's ``prepare`` makes them."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS, count_letters

from ppo_fast import PPOConfig, PPOTrainer
from ppo_fast.rollout.speedups.fast_paths import fast_paths


def in_autocast(model):
    """Change ``model`` as accelerate's prepare(mixed_precision="bf16") does."""
    forward = torch.autocast("cpu", torch.bfloat16)(type(model).forward)
    model.forward = MethodType(forward, model)
    return model


def body_in_autocast(model):
    in_autocast(model.base_model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", [in_autocast, body_in_autocast])
def test_rollout_and_update_compute_the_same(family, change):
    policy = change(tiny_model(family, layers=2))
    config = PPOConfig(critic="head", max_length=8, learning_rate=1e-3)
    trainer = PPOTrainer(policy, None, count_letters, tiny_tokenizer(), "cpu", config=config)
    metrics = trainer.train_step(PROMPTS)
    # old log-probs are computed once more, as the update will compute them
    assert metrics["first_max_log_ratio"] < 1e-6
    assert 0 < metrics["sampling_logprob_difference"] < 0.02
    assert not {path.name: path for path in fast_paths(trainer.policy)}["fused layers"].in_force
