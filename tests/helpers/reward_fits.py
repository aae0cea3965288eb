"""Short trainings of tiny reward models."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_pairs import tiny_pairs

from ppo_fast.models.heads import RewardModel
from ppo_fast.rewards.fit.settings import RewardModelConfig
from ppo_fast.rewards.fit.train import train_reward_model

PAIRS, OTHERS = tiny_pairs(120), tiny_pairs(40, seed=1)
TOKENIZER = tiny_tokenizer()
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

slow = pytest.mark.slow


def fit(model, pairs=PAIRS, *, held_out=None, tokenizer=TOKENIZER, on_step=None, **settings):
    config = RewardModelConfig(**({"learning_rate": 3e-3} | settings))
    return train_reward_model(
        model, tokenizer, pairs, config=config, held_out=held_out, on_step=on_step
    )


def reward_model(seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RewardModel(tiny_model(**options), 64)
