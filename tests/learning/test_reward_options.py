"""Advantages, groups, rewards for tokens, and responses that were cut off."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_trainer import (
    PROMPTS,
    changed,
    count_letters,
    experience_of,
    tiny_trainer,
    weights,
)

from ppo_fast import Rollout
from ppo_fast.critics.baselines import baseline
from ppo_fast.data.rollout import join, select_rows
from ppo_fast.learning.make_experience import length_lambda
from ppo_fast.ops import gae

# Advantages


def test_lambdas_of_policy_and_value_targets():
    trainer = tiny_trainer(
        gae_lambda=0.5, gae_lambda_value=1.0, whiten_advantages=False, max_length=12
    )
    _, e = experience_of(trainer)
    mask = e.tokens.response_mask
    expected = gae(e.rewards, e.values, mask=mask, gamma=1.0, lam=0.5).advantages
    targets = gae(e.rewards, e.values, mask=mask, gamma=1.0, lam=1.0).returns
    torch.testing.assert_close(e.advantages, expected)
    torch.testing.assert_close(e.returns, targets)
    assert not torch.allclose(e.returns, e.advantages + e.values)


def test_lambda_by_length():
    lengths = torch.tensor([1, 5, 20, 40])
    assert length_lambda(lengths, 0.2).tolist() == pytest.approx([0.0, 0.0, 0.75, 0.875])
    trainer = tiny_trainer(gae_length_alpha=0.5, whiten_advantages=False, max_length=12)
    _, e = experience_of(trainer)
    for i, n in enumerate(e.tokens.response_lengths.tolist()):
        lam = max(1 - 1 / (0.5 * n), 0.0)
        row = gae(e.rewards[i : i + 1], e.values[i : i + 1],
                  mask=e.tokens.response_mask[i : i + 1], gamma=1.0, lam=lam)  # fmt: skip
        torch.testing.assert_close(e.advantages[i], row.advantages[0], rtol=1e-5, atol=1e-6)
        plain = gae(e.rewards[i : i + 1], e.values[i : i + 1],
                    mask=e.tokens.response_mask[i : i + 1], gamma=1.0, lam=0.95)  # fmt: skip
        torch.testing.assert_close(e.returns[i], plain.returns[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("critic", ["baseline", "group_mean", "group_norm", "batch_mean"])
def test_advantages_of_groups(critic):
    trainer = tiny_trainer(
        critic=critic, samples_per_prompt=3, kl_penalty=0.0, whiten_advantages=False
    )
    rollout = trainer.rollout(PROMPTS, samples_per_prompt=3)
    assert rollout.prompts == [p for p in PROMPTS for _ in range(3)]
    e = trainer.make_experience(rollout)
    expected = e.scores - baseline(e.scores, critic, 3)
    if critic == "group_norm":
        std = e.scores.view(-1, 3).std(1).repeat_interleave(3)
        expected = expected / (std + 1e-4)
    mask = e.tokens.response_mask
    torch.testing.assert_close(e.advantages, torch.where(mask, expected[:, None], 0.0))


def test_a_group_of_equal_scores_leaves_the_kl_alone():
    """Its standard deviation of 0 divides scores, not the penalty."""
    trainer = tiny_trainer(
        critic="group_norm", samples_per_prompt=2, kl_penalty=0.3, whiten_advantages=False
    )
    with torch.no_grad():
        for p in trainer.policy_model.parameters():
            p.mul_(1.15)
    rollout = trainer.rollout(PROMPTS, samples_per_prompt=2)
    e = trainer.make_experience(rollout, [5.0] * 2 * len(PROMPTS))
    kl = (e.old_logprobs - e.ref_logprobs).flip(1).cumsum(1).flip(1)
    expected = torch.where(e.tokens.response_mask, -0.3 * kl, 0.0)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(e.advantages, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"critic": "group_norm"}, {"critic": "head", "reward_normalization": "group"}]
)
def test_rollouts_have_the_configs_samples_and_groups_need_them(options):
    trainer = tiny_trainer(samples_per_prompt=3, **options)
    assert trainer.rollout(PROMPTS).samples_per_prompt == 3
    assert len(trainer.generate_responses(PROMPTS)[0]) == len(PROMPTS)
    single = trainer.rollout(PROMPTS, samples_per_prompt=1)
    with pytest.raises(ValueError, match="compares the samples of a prompt, and the rollout has"):
        trainer.make_experience(single)


def test_a_step_samples_each_prompt_several_times():
    step = tiny_trainer(critic="baseline", samples_per_prompt=3).step(PROMPTS)
    assert len(step.scores) == 3 * len(PROMPTS)
    assert len(set(step.rollout.completions[:3])) > 1


def test_prompts_without_signal_are_replaced_in_training():
    """All samples of a prompt that begins with T get one score."""

    def score(prompts, completions):
        return [
            0.0 if p[0] == "T" else s
            for p, s in zip(prompts, count_letters(prompts, completions), strict=False)
        ]

    trainer = tiny_trainer(score, critic="baseline", samples_per_prompt=2, max_resampled_batches=9)
    steps = []
    trainer.train(PROMPTS, 3, 2, progress=False, on_step=steps.append)
    assert sum(step.metrics["prompts_resampled"] for step in steps) > 0
    for step in steps:
        assert step.metrics["prompts_without_signal"] == 0.0
        assert len(step.rollout.prompts) == 4
        assert all(prompt[0] != "T" for prompt in step.rollout.prompts)


@pytest.mark.parametrize("k", [None, 1])
def test_joined_rollouts_keep_their_states(k):
    trainer = tiny_trainer(critic="head", num_layers_unfrozen=k)
    with torch.no_grad():
        trainer.critic.module.linear.weight.fill_(0.1)
    first = trainer.rollout(PROMPTS, max_length=12, seeds=torch.arange(5))
    second = trainer.rollout(PROMPTS[:2], max_length=4, seeds=torch.arange(2) + 9)
    both = join([select_rows(first, torch.tensor([3, 0])), second])
    assert both.states is not None
    assert (both.trunk_states is None) == (k is None)
    anew = replace(both, states=None, trunk_states=None)
    kept, expected = (trainer.make_experience(r, [1.0, 2.0, 3.0, 4.0]) for r in (both, anew))
    for name in ("values", "ref_logprobs", "advantages"):
        torch.testing.assert_close(getattr(kept, name), getattr(expected, name))
    trainer.update(kept)


def test_a_step_with_replaced_prompts_is_remembered_whole():
    def score(prompts, completions):
        scores = zip(prompts, count_letters(prompts, completions), strict=True)
        return [0.0 if prompt[0] == "T" else found for prompt, found in scores]

    trainer = tiny_trainer(score, critic="baseline", samples_per_prompt=2, max_resampled_batches=1)
    spare = ["Nobody", "Some"]
    step = trainer.step(["The film", "She"], more_prompts=lambda count: spare[:count])
    assert trainer.last_rollout.prompts == step.rollout.prompts == ["She"] * 2 + ["Nobody"] * 2


# Rewards for tokens


def test_scores_of_tokens_are_rewards_of_their_tokens():
    trainer = tiny_trainer(kl_penalty=0.0, gae_lambda=1.0, whiten_advantages=False)
    rollout = trainer.rollout(PROMPTS)
    mask = rollout.tokens.response_mask
    scores = torch.randn(mask.shape)
    e = trainer.make_experience(rollout, scores)
    expected = torch.where(mask, scores, 0.0)
    assert torch.equal(e.rewards, expected)
    torch.testing.assert_close(e.scores, expected.sum(1))
    lists = [
        row[:n].tolist() for row, n in zip(scores, rollout.tokens.response_lengths, strict=False)
    ]
    assert torch.equal(trainer.make_experience(rollout, lists).advantages, e.advantages)


def test_one_score_is_a_reward_of_the_last_token():
    trainer = tiny_trainer()
    rollout = trainer.rollout(PROMPTS)
    scores = torch.randn(len(PROMPTS))
    of_tokens = torch.zeros(rollout.tokens.response_ids.shape)
    of_tokens[range(len(PROMPTS)), rollout.tokens.response_lengths - 1] = scores
    one, two = trainer.make_experience(rollout, scores), trainer.make_experience(rollout, of_tokens)
    assert torch.equal(one.advantages, two.advantages)
    assert one.metrics == two.metrics


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (torch.zeros(5, 3), r"scores: got shape \[5, 3\], expected \[5\], a number a prompt, or"),
        (torch.full((5, 6), torch.nan), "got nan for the prompt 'The film was'"),
    ],
)
def test_wrong_scores_of_tokens(scores, words):
    trainer = tiny_trainer(max_length=6)
    rollout = trainer.rollout(PROMPTS)
    assert rollout.tokens.response_ids.shape[1] == 6
    with pytest.raises(ValueError, match=words):
        trainer.make_experience(rollout, scores)


class Mean(torch.nn.Module):
    """A score for each token: the mean of the ids so far."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, input_ids, attention_mask=None):
        count = torch.arange(1, input_ids.shape[1] + 1)
        return input_ids.cumsum(1) / count * self.weight


def test_a_module_may_score_tokens():
    trainer = tiny_trainer(Mean(), kl_penalty=0.0)
    rollout, e = experience_of(trainer)
    tokens = rollout.tokens
    for i, ids in enumerate(tokens.sequences()):
        p, n = int(tokens.prompt_lengths[i]), int(tokens.response_lengths[i])
        expected = [float(ids[: p + t + 1].float().mean()) for t in range(n)]
        assert e.rewards[i, :n].tolist() == pytest.approx(expected)


def test_a_score_of_a_token_that_is_not_trained_on_goes_to_the_one_before():
    trainer = tiny_trainer(kl_penalty=0.0)
    trained = [[True, False, False, True], [False, True, True, False]]
    rollout = Rollout.from_tokens([[5], [6]], [[7, 8, 9, 10]] * 2, trained=trained)
    e = trainer.make_experience(rollout, [[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0]])
    assert e.rewards.tolist() == [[7.0, 0.0, 0.0, 8.0], [0.0, 3.0, 12.0, 0.0]]
    assert e.scores.tolist() == [15.0, 15.0]


def test_critics_without_weights_compare_the_sums_of_scores_of_tokens():
    trainer = tiny_trainer(critic="baseline", kl_penalty=0.0)
    rollout = trainer.rollout(PROMPTS)
    scores = torch.randn(rollout.tokens.response_ids.shape)
    of_tokens = trainer.make_experience(rollout, scores)
    sums = torch.where(rollout.tokens.response_mask, scores, 0.0).sum(1)
    whole = trainer.make_experience(rollout, sums)
    torch.testing.assert_close(of_tokens.advantages, whole.advantages)


# Responses that were cut off


def test_lengths_are_those_of_the_rollout_not_of_the_config():
    settings = {"overlong_buffer": 3, "kl_penalty": 0.0, "aggregation": "seq-mean-token-sum"}
    one, two = tiny_trainer(max_length=6, **settings), tiny_trainer(max_length=100, **settings)
    experiences = [
        t.make_experience(t.rollout(PROMPTS, max_length=6, seeds=torch.arange(5)))
        for t in (one, two)
    ]
    assert torch.equal(experiences[0].rewards, experiences[1].rewards)
    assert (experiences[0].rewards.sum(1) < experiences[0].scores).any()
    norms = [t.update(e)["policy_grad_norm"] for t, e in zip((one, two), experiences, strict=True)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_the_kl_of_a_sequence_is_over_those_that_are_trained_on():
    trainer = tiny_trainer(mask_truncated=True)
    with torch.no_grad():
        for p in trainer.policy_model.parameters():
            p.mul_(1.2)
    rollout, e = experience_of(trainer, max_length=24)
    kl = (e.old_logprobs - e.ref_logprobs).sum(1)[rollout.finished]
    assert 0 < len(kl) < len(PROMPTS)
    assert e.metrics["kl_sequence"] == pytest.approx(float(kl.mean()), rel=1e-5)


def test_truncated_responses_are_left_out_of_the_losses():
    trainer = tiny_trainer(mask_truncated=True, whiten_advantages=True)
    rollout, e = experience_of(trainer)
    cut = ~rollout.finished
    assert 0 < cut.sum() < len(cut)
    assert torch.equal(e.tokens.response_mask.any(1), rollout.finished)
    assert not e.advantages[cut].any()
    assert not e.old_logprobs[cut].any()
    mean = e.advantages[e.tokens.response_mask].mean()
    assert float(mean) == pytest.approx(0.0, abs=1e-6)
    metrics = trainer.update(e)
    assert metrics["tokens"] == 2 * float(e.tokens.trained_counts.sum())


def test_a_batch_in_which_all_are_truncated_trains_nothing():
    trainer = tiny_trainer(mask_truncated=True, max_length=1, critic="head", weight_decay=0.0)
    trainer.policy_model.generation_config.eos_token_id = None
    for _ in range(2):  # the second with moments of the first
        rollout = trainer.rollout(PROMPTS)
        trainer.update(trainer.make_experience(replace(rollout, finished=rollout.finished | True)))
    before, value = weights(trainer.policy_model), weights(trainer.critic.module)
    metrics = trainer.train_step(PROMPTS)
    assert metrics["finished_fraction"] == 0.0
    assert all(abs(x) < float("inf") for x in metrics.values())
    assert not changed(trainer.policy_model, before)
    assert not changed(trainer.critic.module, value)
