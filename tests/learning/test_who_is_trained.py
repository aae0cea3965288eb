"""Who is trained and when, and schedules over a run."""

from __future__ import annotations

import pytest
import torch
from tiny_trainer import (
    PROMPTS,
    changed,
    counted,
    tiny_trainer,
    weights,
    without_times,
)

# Who is trained, and when


@pytest.mark.parametrize("critic", ["model", "head", "top"])
def test_the_policy_rests_while_the_critic_warms_up(critic):
    options = {"num_layers_unfrozen": 1} if critic == "top" else {}
    trainer = tiny_trainer(critic=critic, critic_warmup_steps=2, **options)
    policy, value = weights(trainer.policy_model), weights(trainer.critic.module)
    for _ in range(2):
        metrics = trainer.train_step(PROMPTS)
    assert not changed(trainer.policy_model, policy)
    assert changed(trainer.critic.module, value)
    assert metrics["policy_loss"] == 0.0
    assert metrics["value_loss"] > 0.0
    trainer.train_step(PROMPTS)
    assert changed(trainer.policy_model, policy)


@pytest.mark.parametrize("critic", ["model", "head"])
@pytest.mark.parametrize(("policy", "value"), [(1, 3), (3, 1), (2, 2)])
def test_epochs_of_policy_and_critic(critic, policy, value):
    trainer = tiny_trainer(critic=critic, num_epochs=policy, value_epochs=value, num_minibatches=2)
    steps = counted(trainer)
    trainer.train_step(PROMPTS)
    assert steps == {"policy": 2 * policy, "value": 2 * value}


def test_more_value_epochs_leave_the_policy_as_it_would_be():
    one, two = (tiny_trainer(value_epochs=n) for n in (2, 5))
    for trainer in (one, two):
        trainer.train_step(PROMPTS)
    assert not changed(one.policy_model, weights(two.policy_model))
    assert changed(one.value_model, weights(two.value_model))


def test_a_head_that_is_trained_alone_leaves_the_policy_alone():
    """Its gradient does not reach the states."""
    one, two = (tiny_trainer(critic="head", num_epochs=1, value_epochs=n) for n in (1, 4))
    for trainer in (one, two):
        trainer.train_step(PROMPTS)
    assert not changed(one.policy_model, weights(two.policy_model))
    assert changed(one.critic.module, weights(two.critic.module))


@pytest.mark.parametrize("critic", ["model", "head"])
def test_the_policy_rests_beyond_target_kl_and_the_critic_goes_on(critic):
    options = {"critic": critic, "num_epochs": 6, "learning_rate": 3e-2}
    free, held = tiny_trainer(**options), tiny_trainer(target_kl=1e-4, **options)
    assert free.train_step(PROMPTS)["approx_kl_k3"] > 1e-4
    steps = counted(held)
    metrics = held.train_step(PROMPTS)
    assert metrics["policy_optimizer_steps"] == 1.0
    assert steps == {"policy": 1, "value": 6}
    never = tiny_trainer(target_kl=1e6, **options)
    never.train_step(PROMPTS)
    assert not changed(never.policy_model, weights(free.policy_model))


def test_frozen_weights_stay():
    trainer = tiny_trainer(frozen=("*mlp*",), value_frozen=("*self_attn*",))
    policy, value = weights(trainer.policy_model), weights(trainer.value_model)
    trainer.train_step(PROMPTS)
    assert not any("mlp" in name for name in changed(trainer.policy_model, policy))
    moved = changed(trainer.value_model, value)
    assert moved
    assert not any("self_attn" in name for name in moved)


def test_a_pattern_without_a_weight_is_named():
    with pytest.raises(ValueError, match="frozen: '\\*attentions\\*' matches no weight of Llama"):
        tiny_trainer(frozen=("*attentions*",))
    with pytest.raises(ValueError, match="leaves LlamaForCausalLM no weight to train"):
        tiny_trainer(frozen=("*",))


@pytest.mark.parametrize("setting", ["value_epochs", "critic_warmup_steps"])
def test_settings_of_a_critic_need_one(setting):
    with pytest.raises(ValueError, match=rf"{setting}: got 2, but critic='baseline' has no value"):
        tiny_trainer(critic="baseline", **{setting: 2})


def test_weight_decay_leaves_vectors_alone():
    trainer = tiny_trainer(weight_decay=0.1)
    decayed, alone = trainer.policy_optimizer.param_groups
    assert (decayed["weight_decay"], alone["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in alone["params"]} == {1}


@pytest.mark.parametrize("critic", ["model", "head"])
def test_pretraining_trains_the_critic_and_nothing_else(critic):
    one, two = tiny_trainer(critic=critic), tiny_trainer(critic=critic)
    policy = weights(one.policy_model)
    metrics = one.pretrain_critic(PROMPTS, num_steps=20, batch_size=5)
    assert not changed(one.policy_model, policy)
    assert sum(m["value_loss"] for m in metrics[-3:]) < sum(m["value_loss"] for m in metrics[:3])
    assert one.progress.steps == 0
    assert one.learner.state_dict() == two.learner.state_dict()
    tokens = [t.step(PROMPTS).rollout.tokens.response_ids for t in (one, two)]
    assert torch.equal(*tokens), "later draws are the same"


def test_pretraining_has_the_highest_rate_and_leaves_the_schedule_alone():
    schedule = {"lr_schedule": "linear", "lr_warmup": 2, "schedule_steps": 5}
    one, two = tiny_trainer(**schedule), tiny_trainer()
    for trainer in (one, two):
        trainer.pretrain_critic(PROMPTS, num_steps=2, batch_size=5)
    assert not changed(one.value_model, weights(two.value_model))
    metrics = one.train_step(PROMPTS)  # the second of its two optimizer steps: half of the warm-up
    assert metrics["learning_rate"] == pytest.approx(one.config.learning_rate / 2)


def test_coefficients_wait_while_the_policy_rests():
    trainer = tiny_trainer(
        critic_warmup_steps=1, kl_controller="adaptive", kl_target=1.0, kl_horizon=1
    )
    found = [trainer.train_step(PROMPTS)["kl_coefficient"] for _ in range(3)]
    assert found[0] == found[1] == trainer.config.kl_penalty
    assert found[2] != found[1]


def test_pretraining_needs_a_value_function():
    with pytest.raises(ValueError, match="pretrain_critic: the trainer has no value function"):
        tiny_trainer(critic="baseline").pretrain_critic(PROMPTS, 1)


# Schedules


def test_learning_rates_follow_the_schedule_over_a_run():
    trainer = tiny_trainer(
        lr_schedule="linear", learning_rate=1e-3, value_learning_rate=1e-2, num_epochs=2
    )
    rates = []
    trainer.train(PROMPTS, 4, 5, progress=False, on_step=lambda step: rates.append(step.metrics))
    last = [1 - i / 8 for i in (1, 3, 5, 7)]  # of each step's two optimizer steps
    assert [m["learning_rate"] for m in rates] == pytest.approx([1e-3 * x for x in last])
    assert [m["value_learning_rate"] for m in rates] == pytest.approx([1e-2 * x for x in last])


def test_a_step_without_a_known_run_is_refused_before_a_model_runs():
    trainer = tiny_trainer(lr_schedule="cosine")
    with pytest.raises(ValueError, match="depends on the number of steps"):
        trainer.train_step(PROMPTS)
    assert trainer.progress.sequences_sampled == 0


def test_a_linear_kl_coefficient():
    trainer = tiny_trainer(
        critic="baseline", kl_controller="linear", kl_penalty=0.4, kl_penalty_end=0.0
    )
    found = []
    trainer.train(
        PROMPTS, 5, 5, progress=False,
        on_step=lambda step: found.append(step.metrics["kl_coefficient"]),
    )  # fmt: skip
    assert found == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])


RESUMED = {
    "lr_schedule": "cosine",
    "lr_warmup": 2,
    "schedule_steps": 6,
    "kl_controller": "adaptive",
    "kl_target": 1e-3,
    "kl_horizon": 10,
    "entropy_target": 100.0,
    "reward_normalization": "running",
}


def test_weight_decay_may_change_when_a_run_is_resumed(tmp_path):
    first = tiny_trainer()
    first.train_step(PROMPTS)
    path = first.save_checkpoint(tmp_path, 1)
    second = tiny_trainer(weight_decay=0.1)
    second.load_checkpoint(path)
    third = tiny_trainer(weight_decay=0.1)
    third.load_checkpoint(second.save_checkpoint(tmp_path, 2))
    moments = [
        {
            name: t.policy_optimizer.state[p]["exp_avg"]
            for name, p in t.policy_model.named_parameters()
        }
        for t in (first, second, third)
    ]
    for name, expected in moments[0].items():
        assert torch.equal(moments[1][name], expected)
        assert torch.equal(moments[2][name], expected)


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path, kl_in):
    whole = tiny_trainer(kl_in=kl_in, **RESUMED)
    expected = [without_times(whole.train_step(PROMPTS)) for _ in range(4)]
    assert len({m["kl_coefficient"] for m in expected}) == 4
    assert len({m["entropy_coefficient"] for m in expected}) == 4
    first = tiny_trainer(kl_in=kl_in, **RESUMED)
    for _ in range(2):
        first.train_step(PROMPTS)
    path = first.save_checkpoint(tmp_path, 2)
    second = tiny_trainer(kl_in=kl_in, **RESUMED)
    second.load_checkpoint(path)
    assert [without_times(second.train_step(PROMPTS)) for _ in range(2)] == expected[2:]
    assert not changed(second.policy_model, weights(whole.policy_model))
