"""PPOTrainer: its arguments, its attributes, its critics and its trained weights."""

from __future__ import annotations

import ast
import inspect
import warnings
from dataclasses import fields

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_trainer import (
    PROMPTS,
    changed,
    count_letters,
    tiny_reward_model,
    tiny_trainer,
    tiny_value_model,
    weights,
)
from torch.optim import AdamW

from ppo_fast import PPOConfig, PPOTrainer, ValueModel
from ppo_fast.config import settings as config_module

ARGUMENTS = {
    "learning_rate": 2e-5,
    "clip_epsilon": 0.3,
    "kl_penalty": 0.4,
    "gamma": 0.9,
    "gae_lambda": 0.8,
    "value_loss_coef": 0.7,
    "max_grad_norm": 0.6,
}


def models():
    return (
        tiny_model(layers=1, hidden=32),
        tiny_value_model(),
        tiny_reward_model(),
        tiny_tokenizer(),
        torch.device("cpu"),
    )


# Arguments and defaults


def test_arguments_by_position_and_by_name():
    by_position = PPOTrainer(*models(), *ARGUMENTS.values())
    names = ("policy_model", "value_model", "reward_model", "tokenizer", "device")
    by_name = PPOTrainer(**dict(zip(names, models(), strict=True)), **ARGUMENTS)
    for trainer in (by_position, by_name):
        for name, value in ARGUMENTS.items():
            assert getattr(trainer.config, name) == value, name
        for optimizer in (trainer.policy_optimizer, trainer.value_optimizer):
            assert optimizer.param_groups[0]["lr"] == 2e-5


def test_bare_constructor_has_the_numbers_of_the_spec():
    config = PPOTrainer(*models()).config
    assert config == PPOConfig.spec()
    assert (config.learning_rate, config.clip_epsilon, config.kl_penalty) == (1e-5, 0.2, 0.1)
    assert (config.gamma, config.gae_lambda) == (0.99, 0.95)
    assert (config.value_loss_coef, config.max_grad_norm) == (0.5, 1.0)
    assert (config.num_epochs, config.max_length, config.temperature) == (4, 150, 1.0)
    assert config.kl_in == "loss"
    assert config.estimator() == "k1+k2"
    assert config.value_clip is None


def test_default_config_has_the_numbers_of_published_work():
    trainer = PPOTrainer(*models(), config=PPOConfig())
    config = trainer.config
    assert (config.gamma, config.gae_lambda) == (1.0, 0.95)
    assert (config.kl_penalty, config.kl_in, config.estimator()) == (0.05, "reward", "k1")
    assert (config.clip, config.value_clip) == ((0.2, 0.2), 0.2)
    assert (config.num_epochs, config.num_minibatches) == (4, 1)
    assert (config.max_grad_norm, config.whiten_advantages) == (1.0, True)
    for optimizer in (trainer.policy_optimizer, trainer.value_optimizer):
        assert optimizer.param_groups[0]["eps"] == 1e-5


def test_arguments_override_the_config():
    config = PPOConfig(gamma=0.7, kl_penalty=0.3, value_learning_rate=3e-4)
    trainer = PPOTrainer(*models(), learning_rate=5e-6, gamma=0.8, config=config)
    assert (trainer.config.learning_rate, trainer.config.gamma) == (5e-6, 0.8)
    assert trainer.config.kl_penalty == 0.3, "what was not given stays the config's"
    assert trainer.policy_optimizer.param_groups[0]["lr"] == 5e-6
    assert trainer.value_optimizer.param_groups[0]["lr"] == 3e-4
    assert config.gamma == 0.7, "the user's config is left alone"


def test_an_argument_equal_to_its_documented_default_overrides_the_config():
    trainer = PPOTrainer(*models(), gamma=0.99, config=PPOConfig())
    assert trainer.config.gamma == 0.99


def test_every_field_of_the_config_has_a_docstring():
    body = ast.parse(inspect.getsource(config_module)).body
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    (cls,) = [node for node in classes if node.name == "PPOConfig"]
    documented = {
        field.target.id
        for field, after in zip(cls.body, cls.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }
    assert documented == {field.name for field in fields(PPOConfig)}


def test_a_discount_that_hides_the_score_warns_once():
    trainer = tiny_trainer(gamma=0.9)  # 0.9^6 = 0.53
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train_step(PROMPTS[:2])
    with pytest.warns(UserWarning, match=r"gamma.*0\.9.*7 tokens.*0\.48.*gamma=1"):
        trainer.train_step(PROMPTS[:2], max_length=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train_step(PROMPTS[:2], max_length=8)


# Attributes


def test_attributes_are_those_of_the_spec():
    policy, value_model, reward_model, tokenizer, device = models()
    trainer = PPOTrainer(policy, value_model, reward_model, tokenizer, "cpu")
    assert trainer.policy_model is policy
    assert trainer.value_model is value_model
    assert trainer.reward_model is reward_model
    assert trainer.tokenizer is tokenizer
    assert trainer.device == device
    assert trainer.stats["total_steps"] == 0
    for optimizer, model in (
        (trainer.policy_optimizer, policy),
        (trainer.value_optimizer, value_model),
    ):
        assert type(optimizer) is AdamW
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert held == [id(p) for p in model.parameters()]
        assert all(p.dtype == torch.float32 for p in model.parameters())


def test_reference_is_the_frozen_start():
    policy = tiny_model(layers=1, hidden=32).train()
    start = weights(policy)
    trainer = PPOTrainer(policy, None, count_letters, tiny_tokenizer(), "cpu", learning_rate=1e-2)
    reference = trainer.reference_model
    assert not reference.training
    assert not any(module.training for module in reference.modules())
    assert not any(p.requires_grad for p in reference.parameters())
    shared = {p.data_ptr() for p in policy.parameters()} & {
        p.data_ptr() for p in reference.parameters()
    }
    assert not shared
    assert not changed(reference, start)
    trainer.train_step(PROMPTS, max_length=5)
    assert changed(policy, start)
    assert not changed(reference, start)
    assert all(p.grad is None for p in reference.parameters())


def test_reward_model_is_not_trained():
    reward_model = tiny_reward_model().train()
    before = weights(reward_model)
    trainer = tiny_trainer(reward_model)
    trainer.train_step(PROMPTS)
    assert not changed(reward_model, before)
    assert not reward_model.training
    assert all(p.grad is None for p in reward_model.parameters())


# Choice of the critic


def test_critic_follows_the_value_model():
    policy, value_model, reward_model, tokenizer, device = models()
    with_model = PPOTrainer(policy, value_model, reward_model, tokenizer, device)
    assert with_model.critic.module is value_model
    without = PPOTrainer(policy, None, reward_model, tokenizer, device)
    assert not without.critic.trained
    assert without.value_optimizer is None
    assert without.value_model is None


def test_head_is_trained_by_the_value_optimizer():
    trainer = tiny_trainer(critic="head")
    assert trainer.value_model is None
    (group,) = trainer.value_optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in trainer.critic.module.parameters()}
    assert sum(p.numel() for p in group["params"]) == 32 + 1, "a linear head"


@pytest.mark.parametrize("critic", ["head", "baseline"])
def test_value_model_with_another_critic_is_refused(critic):
    with pytest.raises(ValueError, match=rf"value_model: got ValueModel.*{critic}.*pass None"):
        PPOTrainer(*models(), config=PPOConfig(critic=critic))


def test_critic_model_without_a_value_model_is_refused():
    policy, _, reward_model, tokenizer, device = models()
    config = PPOConfig(critic="model")
    with pytest.raises(TypeError, match=r"value_model: got NoneType.*torch\.nn\.Module.*head"):
        PPOTrainer(policy, None, reward_model, tokenizer, device, config=config)


# Weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_become_float32_with_a_warning(dtype):
    policy, value_model, reward_model, tokenizer, device = models()
    policy.to(dtype)
    value_model.to(dtype)
    with pytest.warns(UserWarning, match="half-precision weights become float32") as caught:
        trainer = PPOTrainer(policy, value_model, reward_model, tokenizer, device)
    named = [str(w.message).partition(":")[0] for w in caught]
    assert named == ["policy_model", "value_model"]
    for model in (trainer.policy_model, trainer.value_model, trainer.reference_model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_float32_weights_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PPOTrainer(*models())


def test_weights_shared_with_the_policy_are_refused():
    policy, value_model, reward_model, tokenizer, device = models()
    with pytest.raises(ValueError, match=r"value_model: shares.*policy_model.*deepcopy.*head"):
        PPOTrainer(policy, ValueModel(policy, 32), reward_model, tokenizer, device)
    reward_model.base_model.model.embed_tokens = policy.model.embed_tokens
    with pytest.raises(ValueError, match=r"reward_model: shares.*policy_model.*deepcopy"):
        PPOTrainer(policy, value_model, reward_model, tokenizer, device)


def test_a_policy_with_nothing_to_train_is_refused():
    policy, *rest = models()
    policy.requires_grad_(False)
    with pytest.raises(ValueError, match=r"policy_model.*frozen"):
        PPOTrainer(policy, *rest)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_unfrozen_layers_alone_are_trained(family):
    policy = tiny_model(family, layers=3, hidden=32)
    start = weights(policy)
    config = PPOConfig(num_layers_unfrozen=1, learning_rate=1e-2, max_length=5)
    trainer = PPOTrainer(policy, None, count_letters, tiny_tokenizer(), "cpu", config=config)
    trainer.train_step(PROMPTS)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    tops = ("model.layers.2.", "model.norm.", "lm_head.", "transformer.h.2.", "transformer.ln_f.")
    assert trained == {name for name, _ in policy.named_parameters() if name.startswith(tops)}
    assert changed(policy, start) == trained
    reference = dict(trainer.reference_model.named_parameters())
    for name, p in policy.named_parameters():
        same = p.data_ptr() == reference[name].data_ptr()
        assert same == (not p.requires_grad), f"{name}: what is frozen is shared, nothing else"
    assert not changed(trainer.reference_model, start)
    held = trainer.policy_optimizer.param_groups[0]["params"]
    assert {id(p) for p in held} == {id(p) for p in policy.parameters() if p.requires_grad}
