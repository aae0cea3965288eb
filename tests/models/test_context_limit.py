"""Rows at lengths where a model depends on the rows beside them are refused before it runs."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS, count_letters, true_logprobs
from transformers import AutoConfig, AutoModelForCausalLM

from ppo_fast import PPOConfig, PPOTrainer, RewardModel, ValueModel

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 307, "intermediate_size": 48}
SIZES |= {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


def model_of(family, **options):
    config = AutoConfig.for_model(family, **SIZES, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # attention that matters
    return model


def rotating(family, rope, **options):
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 2}
    return model_of(family, rope_parameters={"rope_theta": 100.0} | rope, **sizes, **options)


def longrope():
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 40} | FACTORS
    limits = {"max_position_embeddings": 128, "original_max_position_embeddings": 40}
    return rotating("phi3", rope, **limits)


def dynamic():
    return rotating("llama", {"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=40)


MODELS = {
    "longrope": (longrope, "its longrope rotary embeddings depend on the other rows"),
    "dynamic": (dynamic, ""),
}


def trainer_of(policy, **models):
    config = PPOConfig(critic=None if models else "head", max_length=8)
    return PPOTrainer(
        policy,
        models.get("value"),
        models.get("reward", count_letters),
        tiny_tokenizer(),
        "cpu",
        config=config,
    )


@pytest.mark.parametrize("kind", MODELS)
def test_short_and_long_rows_within_the_limit(kind):
    trainer = trainer_of(MODELS[kind][0]())
    prompts = ["a", "b" * 32, "c" * 15]
    rollout = trainer.rollout(prompts)
    truth = true_logprobs(trainer.policy_model, rollout.tokens)
    assert rollout.tokens.lengths.max() == 40
    torch.testing.assert_close(rollout.logprobs.double(), truth, rtol=0, atol=2e-5)
    assert trainer.train_step(prompts)["first_max_log_ratio"] < 1e-4


@pytest.mark.parametrize("kind", MODELS)
def test_longer_rows_are_refused(kind):
    make, why = MODELS[kind]
    trainer = trainer_of(make())
    message = rf"exceeds policy_model's context of 40.*{why}.*lower max_length to 7"
    with pytest.raises(ValueError, match=message):
        trainer.train_step(["a", "b" * 33])


@pytest.mark.parametrize("which", ["value", "reward"])
def test_limits_of_the_other_models(which):
    kinds = {"value": ValueModel, "reward": RewardModel}
    trainer = trainer_of(tiny_model(layers=2), **{which: kinds[which](dynamic(), 32)})
    message = f"exceeds {which}_model's context of 40"
    with pytest.raises(ValueError, match=message):
        trainer.train([*PROMPTS, "b" * 33], num_steps=1, batch_size=2, progress=False)
    rollout = trainer.rollout(["b" * 33])
    with pytest.raises(ValueError, match=f"the longest sequence has 41 tokens, which {message}"):
        trainer.make_experience(rollout)
