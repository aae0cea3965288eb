"""The model that the KL is measured to: a copy of the policy, or another that is given."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS, count_letters, tiny_trainer, true_logprobs, weights
from torch import nn

from ppo_fast import PPO, PPOConfig, PPOTrainer, ValueModel


def ppo_of(policy, reference, **options):
    config = PPOConfig(**({"critic": "head", "max_length": 6, "kl_penalty": 0.3} | options))
    return PPO(policy, tiny_tokenizer(), count_letters, reference_model=reference, config=config)


@pytest.mark.parametrize(
    "options", [{}, {"num_layers_unfrozen": 1}, {"compute_dtype": "bfloat16"}], ids=str
)
def test_the_kl_is_measured_to_the_model_given(options):
    other = tiny_model(seed=5)
    ppo = ppo_of(tiny_model(), other, **options)
    assert ppo.reference.model is other
    assert not any(p.requires_grad for p in other.parameters())
    before = weights(other)
    rollout = ppo.rollout(PROMPTS)
    experience = ppo.make_experience(rollout)
    truth = true_logprobs(other, rollout.tokens)
    near = 1e-4 if "compute_dtype" not in options else 0.1
    torch.testing.assert_close(experience.ref_logprobs.double(), truth, rtol=0, atol=near)
    assert abs(experience.metrics["kl_divergence"]) > 0.1
    ppo.update(experience)
    assert all(torch.equal(w, before[name]) for name, w in other.state_dict().items())


def test_a_model_may_be_set_later():
    trainer, other = tiny_trainer(), tiny_model(seed=5)
    assert abs(trainer.train_step(PROMPTS)["kl_divergence"]) < 0.1
    trainer.reference_model = other
    assert trainer.reference_model is other
    rollout = trainer.rollout(PROMPTS)
    found = trainer.get_reference_logprobs(rollout.prompts, rollout.completions)
    truth = true_logprobs(other, rollout.tokens)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-4)
    assert abs(trainer.train_step(PROMPTS)["kl_divergence"]) > 0.1


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda policy: nn.Linear(2, 2), TypeError, "reference_model: got Linear"),
        (lambda policy: policy, ValueError, "reference_model: shares trained weights"),
        (
            lambda policy: tiny_model(vocab_size=311),
            ValueError,
            "reference_model: its vocabulary has 311 tokens, the policy's 307",
        ),
    ],
)
def test_models_that_do_not_fit(make, error, match):
    policy = tiny_model()
    with pytest.raises(error, match=match):
        ppo_of(policy, make(policy))


def test_a_reference_does_not_freeze_the_value_model():
    other = tiny_model(seed=5)
    value = ValueModel(other.model, 64)
    config = PPOConfig(max_length=6)
    words = "reference_model: shares trained weights with value_model"
    with pytest.raises(ValueError, match=words):
        PPO(
            tiny_model(), tiny_tokenizer(), count_letters,
            value_model=value, reference_model=other, config=config,
        )  # fmt: skip
    assert all(p.requires_grad for p in value.parameters())
    trainer = tiny_trainer()
    with pytest.raises(ValueError, match=words):
        trainer.reference_model = trainer.value_model.base_model


@pytest.mark.parametrize("name", ["policy_model", "value_model", "config"])
def test_what_cannot_be_replaced_says_so(name):
    trainer = tiny_trainer()
    with pytest.raises(AttributeError, match=f"'{name}' of 'PPOTrainer' object has no setter"):
        setattr(trainer, name, getattr(trainer, name))


def test_the_classic_constructor_takes_it():
    other = tiny_model(seed=5)
    trainer = PPOTrainer(
        tiny_model(), None, count_letters, tiny_tokenizer(), "cpu", reference_model=other,
        config=PPOConfig(critic="head"),
    )  # fmt: skip
    assert trainer.reference_model is other
