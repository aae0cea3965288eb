"""Options of a step, each on a tiny trainer: what changes, and what must not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_trainer import (
    PROMPTS,
    changed,
    count_letters,
    tiny_trainer,
    tiny_value_model,
    weights,
    without_times,
)

from ppo_fast import PPO, PPOConfig, Rollout
from ppo_fast.critics.baselines import baseline
from ppo_fast.learning.make_experience import length_lambda
from ppo_fast.ops import gae


def experience_of(trainer, scores=None, **options):
    rollout = trainer.rollout(PROMPTS, seeds=torch.arange(len(PROMPTS)), **options)
    return rollout, trainer.make_experience(rollout, scores)


def counted(trainer) -> dict[str, int]:
    """Return the numbers of optimizer steps from now on, by name."""
    steps = dict.fromkeys(trainer.learner.optimizers, 0)
    for name, optimizer in trainer.learner.optimizers.items():
        optimizer.register_step_post_hook(
            lambda *_, name=name: steps.update({name: steps[name] + 1})
        )
    return steps


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
