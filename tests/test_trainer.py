"""PPOTrainer: its arguments, its attributes, and what a step does."""

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
    true_logprobs,
    weights,
    without_times,
)
from torch import nn
from torch.optim import SGD, AdamW

from ppo_fast import PPOConfig, PPOTrainer, ValueModel
from ppo_fast import config as config_module

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


def test_config_has_the_numbers_of_the_field():
    trainer = PPOTrainer(*models(), config=PPOConfig())
    config = trainer.config
    assert (config.gamma, config.gae_lambda) == (1.0, 0.95)
    assert (config.kl_penalty, config.kl_in, config.estimator()) == (0.05, "reward", "k1")
    assert (config.clip, config.value_clip) == ((0.2, 0.2), 0.2)
    assert (config.num_epochs, config.num_minibatches) == (4, 1)
    assert (config.max_grad_norm, config.whiten_advantages) == (1.0, True)
    for optimizer in (trainer.policy_optimizer, trainer.value_optimizer):
        assert optimizer.param_groups[0]["eps"] == 1e-5


def test_arguments_beat_the_config():
    config = PPOConfig(gamma=0.7, kl_penalty=0.3, value_learning_rate=3e-4)
    trainer = PPOTrainer(*models(), learning_rate=5e-6, gamma=0.8, config=config)
    assert (trainer.config.learning_rate, trainer.config.gamma) == (5e-6, 0.8)
    assert trainer.config.kl_penalty == 0.3, "what was not given stays the config's"
    assert trainer.policy_optimizer.param_groups[0]["lr"] == 5e-6
    assert trainer.value_optimizer.param_groups[0]["lr"] == 3e-4
    assert config.gamma == 0.7, "the user's config is left alone"


def test_an_argument_equal_to_its_documented_default_still_beats_the_config():
    trainer = PPOTrainer(*models(), gamma=0.99, config=PPOConfig())
    assert trainer.config.gamma == 0.99


def test_every_field_of_the_config_says_what_its_default_rests_on():
    body = ast.parse(inspect.getsource(config_module)).body
    (cls,) = [node for node in body if isinstance(node, ast.ClassDef)]
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


# Who is the critic


def test_critic_follows_the_value_model():
    policy, value_model, reward_model, tokenizer, device = models()
    with_model = PPOTrainer(policy, value_model, reward_model, tokenizer, device)
    assert with_model.critic.module is value_model
    without = PPOTrainer(policy, None, reward_model, tokenizer, device)
    assert without.critic is None
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


# A step


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
@pytest.mark.parametrize("critic", ["model", "head", "baseline"])
def test_train_step_trains(critic, kl_in):
    trainer = tiny_trainer(critic=critic, kl_in=kl_in)
    policy = weights(trainer.policy_model)
    value = None if trainer.critic is None else weights(trainer.critic.module)
    metrics = trainer.train_step(PROMPTS)
    assert changed(trainer.policy_model, policy) == policy.keys()
    if critic == "baseline":
        assert metrics["value_loss"] == 0.0
    else:
        unused = {n for n in value if "lm_head" in n}  # ValueModel's base keeps its LM head
        assert changed(trainer.critic.module, value) == value.keys() - unused
        assert metrics["value_loss"] > 0.0
    named = {"policy_loss", "value_loss", "kl_divergence", "mean_reward", "mean_advantage"}
    assert named <= metrics.keys()
    assert {type(value) for value in metrics.values()} == {float}
    assert trainer.stats["total_steps"] == 1
    assert all(p.grad is None for p in trainer.policy_model.parameters())


def drifted_trainer(**options):
    """One whose policy is no longer its reference."""
    trainer = tiny_trainer(**options)
    with torch.no_grad():
        for p in trainer.policy_model.parameters():
            p.mul_(1.15)
    return trainer


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_metrics_of_a_step(temperature):
    trainer = drifted_trainer(critic="model", kl_penalty=0.5)
    rollout = trainer.rollout(PROMPTS, max_length=24, temperature=temperature)
    lengths = rollout.tokens.response_lengths
    assert len(set(lengths.tolist())) > 1, "some responses end with EOS"
    ours = true_logprobs(trainer.policy_model, rollout.tokens, temperature)
    theirs = true_logprobs(trainer.reference_model, rollout.tokens, temperature)
    experience = trainer.make_experience(rollout)
    metrics = trainer.update(experience)
    kl = (ours - theirs).sum().item() / lengths.sum().item()
    assert kl > 0.01
    assert metrics["kl_divergence"] == pytest.approx(kl, rel=1e-4, abs=1e-6)
    scores = count_letters(rollout.prompts, rollout.completions)
    assert metrics["mean_reward"] == pytest.approx(sum(scores) / len(scores), rel=1e-5)
    mask = rollout.tokens.response_mask
    raw = (experience.returns - experience.values)[mask].mean().item()
    assert metrics["mean_advantage"] == pytest.approx(raw, rel=1e-4, abs=1e-6)
    assert abs(raw) > 0.01, "whitened ones would have mean 0"
    assert experience.advantages[mask].mean().abs() < 1e-5


def test_open_loop_is_the_train_step():
    closed, opened = tiny_trainer(), tiny_trainer()
    for _ in range(2):
        expected = closed.train_step(PROMPTS, num_epochs_per_batch=3, temperature=0.8)
        rollout = opened.rollout(PROMPTS, temperature=0.8)
        found = opened.update(opened.make_experience(rollout), num_epochs_per_batch=3)
        assert without_times(expected) == found
    assert not changed(opened.policy_model, weights(closed.policy_model))
    assert not changed(opened.value_model, weights(closed.value_model))
    assert opened.stats == closed.stats


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_own_scores(kind):
    def never(prompts, completions):
        raise AssertionError("the reward model was asked")

    trainer = tiny_trainer(never, kl_in="loss")
    rollout = trainer.rollout(PROMPTS)
    scores = [3.0, -1.0, 0.5, 2.0, 0.0]
    experience = trainer.make_experience(rollout, scores=kind(scores))
    last = rollout.tokens.response_lengths - 1
    expected = torch.zeros_like(experience.rewards)
    expected[torch.arange(5), last] = torch.tensor(scores)
    assert torch.equal(experience.rewards, expected)
    assert experience.scores.tolist() == scores
    assert trainer.update(experience)["mean_reward"] == pytest.approx(0.9)


@pytest.mark.parametrize("wrong", [[1.0], [[1.0]] * 5, [1.0, float("nan"), 0.0, 0.0, 0.0]])
def test_own_scores_are_checked(wrong):
    trainer = tiny_trainer()
    rollout = trainer.rollout(PROMPTS)
    with pytest.raises((ValueError, TypeError), match="scores"):
        trainer.make_experience(rollout, scores=wrong)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}])
def test_the_first_ratio_is_one(family, options):
    policy = tiny_model(family, hidden=32).train()  # GPT-2 has dropout, which must be off
    config = PPOConfig(max_length=12, temperature=0.7, **options)
    trainer = PPOTrainer(policy, None, count_letters, tiny_tokenizer(), "cpu", config=config)
    for _ in range(2):
        metrics = trainer.train_step(PROMPTS)
        assert 0 <= metrics["first_max_log_ratio"] < 1e-4
        assert metrics["max_log_ratio"] > 1e-4, "later ones are not"


def test_epochs_and_minibatches_count_the_optimizer_steps():
    trainer = tiny_trainer(num_minibatches=2, num_epochs=3)
    steps = {"policy": 0, "value": 0}
    for name in steps:

        def count(optimizer, args, kwargs, name=name):
            steps[name] += 1

        getattr(trainer, f"{name}_optimizer").register_step_post_hook(count)
    trainer.train_step(PROMPTS)
    assert steps == {"policy": 6, "value": 6}
    trainer.train_step(PROMPTS, num_epochs_per_batch=1)
    assert steps == {"policy": 8, "value": 8}


def test_minibatches_follow_the_seed_and_the_step():
    seen = []
    for seed in (0, 0, 1):
        trainer = tiny_trainer(seed=seed, num_minibatches=5, num_epochs=2)
        read = []

        def forward(tokens, trunk=None, inner=trainer.policy.forward, read=read):
            if len(tokens) == 1:  # a minibatch
                read.append(tuple(tokens.sequences()[0].tolist()))
            return inner(tokens, trunk)

        trainer.policy.forward = forward
        for _ in range(2):
            rollout = trainer.rollout(PROMPTS, seeds=torch.arange(5))
            trainer.update(trainer.make_experience(rollout, scores=[0.0] * 5))
        prompts = [row[:3] for row in read]
        epochs = [prompts[i : i + 5] for i in range(0, 20, 5)]
        assert all(len(set(epoch)) == 5 for epoch in epochs), "every sequence once an epoch"
        assert len(set(map(tuple, epochs))) > 1, "in an order of its own"
        seen.append(prompts)
    assert seen[0] == seen[1] != seen[2]


def plain_steps(trainer):
    """Replace AdamW, which would turn the rounding of a tiny gradient into a whole step."""
    trainer.policy_optimizer = SGD(trainer.policy_model.parameters(), lr=0.1)
    if trainer.critic is not None:
        trainer.value_optimizer = SGD(trainer.critic.module.parameters(), lr=0.1)
    return trainer


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("critic", ["model", "head"])
def test_microbatches_change_nothing_but_rounding(critic, aggregation):
    def trained(microbatch_tokens):
        trainer = plain_steps(
            tiny_trainer(
                critic=critic,
                aggregation=aggregation,
                entropy_coef=0.1,
                kl_in="loss",
                microbatch_tokens=microbatch_tokens,
                forward_batch_tokens=microbatch_tokens,
            )
        )
        # lengths must differ for a mean of means to show
        metrics = trainer.train_step(PROMPTS, max_length=24, num_epochs_per_batch=1)
        assert len(set(trainer.last_rollout.tokens.response_lengths.tolist())) > 1
        return trainer, without_times(metrics)

    whole, metrics = trained(16384)
    start = tiny_trainer().policy_model.state_dict()
    for tokens in (70, 1):
        split, split_metrics = trained(tokens)
        assert split_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5)
        for name, weight in whole.policy_model.state_dict().items():
            step = (weight - start[name]).abs().max()
            assert step > 0
            error = (split.policy_model.state_dict()[name] - weight).abs().max()
            assert error < 1e-3 * step + 1e-7, name
        for name, weight in whole.critic.module.state_dict().items():
            other = split.critic.module.state_dict()[name]
            torch.testing.assert_close(other, weight, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_for_each_model():
    trainer = plain_steps(tiny_trainer(max_grad_norm=1e-3))
    for model in (trainer.policy_model, trainer.value_model):
        model.before = weights(model)
    trainer.train_step(PROMPTS, num_epochs_per_batch=1)
    for model in (trainer.policy_model, trainer.value_model):
        moved = [model.state_dict()[n] - w for n, w in model.before.items()]
        norm = torch.stack([m.double().norm() for m in moved]).norm().item()
        assert norm == pytest.approx(0.1 * 1e-3, rel=0.02)


def test_value_loss_coef_scales_the_value_gradient():
    moved = []
    for coef in (0.25, 0.5, 0.0):
        trainer = plain_steps(tiny_trainer(value_loss_coef=coef, max_grad_norm=float("inf")))
        start = weights(trainer.value_model)
        trainer.train_step(PROMPTS, num_epochs_per_batch=1)
        bias = "value_head.3.bias"
        moved.append((trainer.value_model.state_dict()[bias] - start[bias]).item())
    assert moved[1] == pytest.approx(2 * moved[0], rel=1e-3)
    assert moved[0] != 0.0
    assert moved[2] == 0.0


@pytest.mark.parametrize("whose", ["policy_model", "value_model"])
def test_nan_gradients_leave_the_weights_alone(whose):
    trainer = tiny_trainer()
    trainer.train_step(PROMPTS)
    policy, value = weights(trainer.policy_model), weights(trainer.value_model)
    stats = dict(trainer.stats)
    weight = next(p for p in getattr(trainer, whose).parameters())
    handle = weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError, match=r"gradient norms.*nan.*learning rate"):
        trainer.train_step(PROMPTS)
    assert not changed(trainer.policy_model, policy)
    assert not changed(trainer.value_model, value)
    assert trainer.stats == stats
    handle.remove()
    trainer.train_step(PROMPTS)
    for model, before in ((trainer.policy_model, policy), (trainer.value_model, value)):
        assert all(w.isfinite().all() for w in model.state_dict().values())
        assert changed(model, before), "no NaN was left in the gradients"


def test_rollout_depends_on_seeds_alone():
    trainer = tiny_trainer()
    first, second = trainer.rollout(PROMPTS), trainer.rollout(PROMPTS)
    assert first.completions != second.completions
    seeds = torch.arange(100, 105)
    again = [trainer.rollout(PROMPTS, seeds=seeds).completions for _ in range(2)]
    assert again[0] == again[1]
    one = trainer.rollout(PROMPTS[2:3], seeds=seeds[2:3]).completions
    assert one == again[0][2:3]
    assert tiny_trainer().rollout(PROMPTS).completions == first.completions
    assert tiny_trainer(seed=1).rollout(PROMPTS).completions != first.completions


def test_max_length_counts_response_tokens():
    trainer = tiny_trainer()
    rollout = trainer.rollout(PROMPTS, max_length=3)
    assert rollout.tokens.response_ids.shape == (5, 3)
    assert trainer.rollout(PROMPTS).tokens.response_ids.shape == (5, 6), "the config's"


def test_python_function_gets_the_sampled_texts():
    seen = []

    def reward(prompts, completions):
        seen.append((prompts, completions))
        return [0.0] * len(prompts)

    trainer = tiny_trainer(reward)
    trainer.train_step(PROMPTS)
    ((prompts, completions),) = seen
    assert prompts == PROMPTS
    assert completions == trainer.last_rollout.completions


class SumOfIds(nn.Module):
    def forward(self, input_ids, attention_mask):
        return (input_ids * attention_mask).sum(dim=1, keepdim=True).float()


def test_a_module_scores_the_sampled_ids():
    trainer = tiny_trainer(SumOfIds())
    trainer.train_step(PROMPTS)
    rows = trainer.last_rollout.tokens.sequences()
    assert trainer.last_scores.tolist() == [float(row.sum()) for row in rows]
