"""Weights of tokens, recipes, and that nothing depends on how a batch is split."""

from __future__ import annotations

import pytest
import torch
from tiny_trainer import (
    PROMPTS,
    changed,
    count_letters,
    experience_of,
    tiny_trainer,
    tiny_value_model,
    weights,
)

from ppo_fast import PPO, PPOConfig, Rollout

# Weights of tokens


@pytest.mark.parametrize(
    "options", [{"importance": "truncate"}, {"ratio_to": "sampler", "objective": "mask"}]
)
def test_tokens_of_an_unknown_sampler_are_refused(options):
    trainer = tiny_trainer(**options)
    rollout = Rollout.from_tokens([[5, 6], [7]], [[8, 9], [10]])
    with pytest.raises(ValueError, match="has no sampling_logprobs, which ratio_to='sampler' and"):
        trainer.make_experience(rollout, [1.0, 2.0])
    known = Rollout.from_tokens([[5, 6], [7]], [[8, 9], [10]], sampling_logprobs=[[-1, -2], [-3]])
    found = trainer.make_experience(known, [1.0, 2.0])
    assert known.logprobs is None
    assert found.metrics["sampling_log_ratio_max"] > 0.5


def test_tokens_of_an_unknown_sampler_have_no_metrics_of_it():
    trainer = tiny_trainer()
    rollout = Rollout.from_tokens([[5, 6], [7]], [[8, 9], [10]])
    assert not any("sampl" in name for name in trainer.make_experience(rollout, [1.0, 2.0]).metrics)


def test_importance_weights_of_a_truncated_sampler():
    trainer = tiny_trainer(top_k=20, importance="truncate", importance_range=(0.0, 0.6))
    rollout, e = experience_of(trainer)
    mask = e.tokens.response_mask
    ratios = (e.old_logprobs - rollout.sampling_logprobs).exp()
    assert (ratios[mask] < 1).all(), "the sampler's probabilities are larger"
    torch.testing.assert_close(e.weights, ratios.clamp(max=0.6) * mask)
    assert 0 < e.metrics["effective_sample_size"] <= 1
    assert e.metrics["sampling_kl"] > 0


def test_the_ratio_to_the_sampler():
    trainer = tiny_trainer(top_k=20, ratio_to="sampler", objective="mask")
    rollout, e = experience_of(trainer)
    assert torch.equal(e.old_logprobs, rollout.sampling_logprobs)
    metrics = trainer.update(e)
    assert metrics["first_max_log_ratio"] > 0.1
    assert metrics["first_max_log_ratio"] == pytest.approx(e.metrics["sampling_log_ratio_max"])


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_tokens_of_highest_entropy(share):
    trainer = tiny_trainer(
        entropy_bonus_share=share, entropy_coef=0.1, loss_token_share=share, max_length=12
    )
    _rollout, e = experience_of(trainer)
    tokens = e.tokens
    states = trainer.policy.forward(tokens)
    entropy = trainer.policy.logprobs(states, tokens, temperature=1.0, entropy=True).entropy
    mask = tokens.response_mask
    count = round(share * int(mask.sum()))
    chosen = entropy[mask].sort(descending=True).values[:count]
    assert int(e.high_entropy.sum()) == count
    torch.testing.assert_close(entropy[e.high_entropy].sort(descending=True).values, chosen)
    assert torch.equal(e.weights, e.high_entropy.float())
    assert trainer.update(e)["entropy"] == e.metrics["entropy"], "of all tokens"


# Nothing depends on how a batch is split


SPLIT = [
    {"ratio": "sequence", "aggregation": "seq-mean-token-mean"},
    {"ratio": "sequence-product", "aggregation": "seq-mean-token-sum"},
    {"objective": "cispo", "aggregation": "token-sum", "learning_rate": 1e-5},
    {"objective": "mask", "clip_epsilon": 0.8, "clip_epsilon_high": 3.0},
    {"top_k": 30, "importance": "mask", "importance_range": (0.3, 2.0)},
    {"top_k": 30, "importance": "sequence-truncate"},
    {"entropy_coef": 0.01, "entropy_bonus_share": 0.3},
    {"loss_token_share": 0.5, "value_huber": 0.1},
    {"mask_truncated": True, "missing_eos_penalty": 1.0},
    {"reward_normalization": "batch", "reward_clip": 0.5},
    {"critic": "head", "value_epochs": 3},
]


@pytest.mark.parametrize("options", SPLIT, ids=str)
def test_microbatches_change_nothing_but_rounding(options):
    whole, split = (
        tiny_trainer(microbatch_tokens=n, forward_batch_tokens=n, **options) for n in (10_000, 30)
    )
    for trainer in (whole, split):
        trainer.train_step(PROMPTS, max_length=8)
    for one, two in zip(
        whole.policy_model.parameters(), split.policy_model.parameters(), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


# Presets


@pytest.mark.parametrize(
    ("preset", "critic"),
    [("sao", "model"), ("sao", "head"), ("rloo", "baseline"), ("grpo", "group_norm")],
)
def test_a_preset_trains(preset, critic):
    config = getattr(PPOConfig, preset)(critic=critic, max_length=20, learning_rate=1e-3)
    base = tiny_trainer(critic="baseline")
    value_model = tiny_value_model() if critic == "model" else None
    ppo = PPO(
        base.policy_model, base.tokenizer, count_letters, value_model=value_model, config=config
    )
    before = weights(ppo.policy.model)
    for _ in range(config.critic_warmup_steps + 1):
        step = ppo.step(PROMPTS)
    assert changed(ppo.policy.model, before)
    assert len(step.scores) == config.samples_per_prompt * len(PROMPTS)
