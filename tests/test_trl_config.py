"""PPOConfig.trl: names and defaults of TRL 1.12.0's PPOConfig."""

from __future__ import annotations

import math

import pytest

from ppo_fast import PPOConfig


def test_defaults():
    found = PPOConfig.trl()
    expected = PPOConfig(
        learning_rate=3e-6,
        lr_schedule="linear",
        num_epochs=4,
        num_minibatches=1,
        kl_penalty=0.05,
        kl_in="reward",
        kl_estimator="k1",
        clip_epsilon=0.2,
        value_clip=0.2,
        value_loss_coef=0.1,
        gamma=1.0,
        gae_lambda=0.95,
        max_length=53,
        temperature=0.7,
        adam_eps=1e-8,
        max_grad_norm=math.inf,
        gradient_checkpointing=True,
        compute_dtype="bfloat16",
        seed=42,
    )
    assert found == expected


def test_arguments_are_translated():
    found = PPOConfig.trl(
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=7,
        stop_token_id=3,
        missing_eos_penalty=1.5,
        adam_beta2=0.95,
        bf16=False,
        whiten_rewards=False,
        stop_token="eos",
        critic="head",
    )
    assert found.critic == "head"
    assert (found.lr_schedule, found.stop_token_ids) == ("constant", (3,))
    assert found.lr_warmup == 7 * 4, "TRL counts updates"
    assert (found.missing_eos_penalty, found.adam_betas) == (1.5, (0.9, 0.95))
    assert found.compute_dtype is None


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"total_episodes": 100}, TypeError, r"has no counterpart; use num_steps of train\(\)"),
        ({"deepspeed": "x.json"}, TypeError, "has no counterpart; docs/migrate.md"),
        ({"whiten_rewards": True}, ValueError, "whiten_rewards: got True"),
        ({"lr_scheduler_type": "polynomial"}, ValueError, "lr_scheduler_type: got 'polynomial'"),
        ({"kl_estimator": "k2"}, ValueError, "kl_estimator: got 'k2', TRL has 'k1' and 'k3'"),
        ({"cliprange": 2.0}, ValueError, "clip_epsilon: got 2.0"),
    ],
)
def test_what_has_no_counterpart_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        PPOConfig.trl(**arguments)
