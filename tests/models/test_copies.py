"""The frozen reference and a critic's own layers do not follow the policy's weights."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS, changed, count_letters, weights

from ppo_fast import PPOConfig, PPOTrainer


def trainer_of(policy, **options):
    settings = {"critic": "head", "max_length": 6, "learning_rate": 1e-2, "num_epochs": 1}
    config = PPOConfig(**(settings | options))
    return PPOTrainer(policy, None, count_letters, tiny_tokenizer(), "cpu", config=config)


def compiled_body(policy):
    policy.model.forward = torch.compile(policy.model.forward, backend="eager")


def compiled_layer(policy):
    layer = policy.model.layers[-1]
    layer.forward = torch.compile(layer.forward, backend="eager")


def method_of_the_module(policy):
    layer = policy.model.layers[-1]
    own = type(layer).forward
    layer.forward = MethodType(lambda self, *args, **kwargs: own(self, *args, **kwargs), layer)


def whole_module(policy):
    policy.model.compile(backend="eager")


def logits(model):
    with torch.no_grad():
        return model.model(input_ids=torch.arange(2, 12)[None]).logits


@pytest.mark.parametrize(
    "change", [compiled_body, compiled_layer, method_of_the_module, whole_module]
)
@pytest.mark.parametrize("critic", ["head", "top"])
def test_reference_stays_where_it_was(change, critic):
    policy = tiny_model(layers=3)
    change(policy)
    trainer = trainer_of(policy, critic=critic, num_layers_unfrozen=1)
    before, critic_before = logits(trainer.reference), weights(trainer.critic.module)
    policy_before = logits(trainer.policy)
    for _ in range(2):  # a new value head gives its layers no gradient in the first
        trainer.train_step(PROMPTS)
    assert torch.equal(logits(trainer.reference), before)
    assert (logits(trainer.policy) - policy_before).abs().max() > 1e-3
    if critic == "top":
        assert any("layers.2" in name for name in changed(trainer.critic.module, critic_before))


def wrapped_layer(policy):
    layer = policy.model.layers[-1].mlp
    inner = layer.forward
    layer.forward = lambda x: inner(x)


def layer_that_holds_a_function(policy):
    mlp = policy.model.layers[-1].mlp
    product = mlp.up_proj
    mlp.down_proj.register_forward_hook(lambda _, __, y: y + 0 * product.weight.sum())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (wrapped_layer, r"forward of model\.layers\.2\.mlp was replaced by a function bound"),
        (layer_that_holds_a_function, "cannot be copied: it holds a function bound"),
    ],
)
def test_a_copy_that_would_follow_the_policy_is_refused(change, match):
    policy = tiny_model(layers=3)
    change(policy)
    with pytest.raises(ValueError, match=match):
        trainer_of(policy)


@pytest.mark.parametrize("family", FAMILIES)
def test_forwards_of_frozen_modules_may_be_any_function(family):
    policy = tiny_model(family, layers=3)
    embedding = policy.get_input_embeddings()
    inner = embedding.forward
    embedding.forward = lambda ids: inner(ids)
    trainer = trainer_of(policy, num_layers_unfrozen=1)
    assert trainer.train_step(PROMPTS)["first_max_log_ratio"] < 1e-5
