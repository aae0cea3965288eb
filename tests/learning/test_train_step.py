"""What a step of PPOTrainer does: rollout, experience, update."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_trainer import (
    PROMPTS,
    changed,
    count_letters,
    tiny_trainer,
    true_logprobs,
    weights,
    without_times,
)
from torch import nn
from torch.optim import SGD

from ppo_fast import PPOConfig, PPOTrainer


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
@pytest.mark.parametrize("critic", ["model", "head", "baseline"])
def test_train_step_trains(critic, kl_in):
    trainer = tiny_trainer(critic=critic, kl_in=kl_in)
    policy = weights(trainer.policy_model)
    value = weights(trainer.critic.module)
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
    """Return a trainer whose policy differs from its reference."""
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
        seeds = opened.progress.next_seeds(len(PROMPTS))
        rollout = opened.rollout(PROMPTS, temperature=0.8, seeds=seeds)
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

        def forward(tokens, trunk_states=None, inner=trainer.policy.forward, read=read):
            if len(tokens) == 1:  # a minibatch
                read.append(tuple(tokens.sequences()[0].tolist()))
            return inner(tokens, trunk_states)

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
    """Replace AdamW by SGD: AdamW would turn rounding errors of tiny gradients into full steps."""
    trainer.policy_optimizer = SGD(trainer.policy_model.parameters(), lr=0.1)
    if trainer.critic.trained:
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


@pytest.mark.parametrize(
    ("together", "expected"),
    [(True, [(True, True), (False, True)] * 2), (False, [(True, False), (False, True)] * 2)],
)
def test_gradients_of_policy_and_value_model_live_together_only_if_asked(together, expected):
    trainer, steps = tiny_trainer(check_gradients_together=together), []

    def holding(model):
        return any(p.grad is not None for p in model.parameters())

    def note(*_):
        steps.append((holding(trainer.policy_model), holding(trainer.value_model)))

    for optimizer in (trainer.policy_optimizer, trainer.value_optimizer):
        optimizer.register_step_pre_hook(note)
    trainer.train_step(PROMPTS)
    assert steps == expected


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


def test_quantiles_of_ratios_are_those_of_the_last_epoch(monkeypatch):
    seen = []

    def quantiles(log_ratios, masks):
        seen.append([float(x[mask].abs().max()) for x, mask in zip(log_ratios, masks, strict=True)])
        return {}

    monkeypatch.setattr("ppo_fast.learning.minibatches.ratio_quantiles", quantiles)
    tiny_trainer(num_epochs=3).train_step(PROMPTS)
    ((largest,),) = seen
    assert largest > 0, "the ratios of the first epoch are 1"


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
    step = trainer.step(PROMPTS)
    rows = step.rollout.tokens.sequences()
    assert step.scores.tolist() == [float(row.sum()) for row in rows]
