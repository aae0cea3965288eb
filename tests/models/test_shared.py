"""Shared layers are computed once: the policy's trunk for reward and value models, and the LM head
for policy and reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_batch import batch
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS, count_letters, without_times

from ppo_fast import PPOConfig, PPOTrainer, RewardModel, ValueModel
from ppo_fast.learning.make_experience import trunk_states_in_batches
from ppo_fast.models import language_model
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.logprobs_of_both import logprobs_of_both
from ppo_fast.models.parts import layer_list
from ppo_fast.models.trunk import top_modules

LAYERS = 3


class OwnReward(RewardModel):
    """A reward model of a user's class, which does not share the trunk."""


class OwnValue(ValueModel):
    """A value model of a user's class, which does not share the trunk."""


def on_the_same_base(kind, family="llama", *, frozen=True):
    """Return a model with the policy's lower layers and another top."""
    base = tiny_model(family, layers=LAYERS)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        model = kind(base, 64)
        top = [p for m in top_modules(base.base_model, 1) for p in m.parameters()]
        for parameter in top:
            parameter += 0.1 * torch.randn_like(parameter)
    for parameter in base.parameters():
        parameter.requires_grad_(not frozen or any(parameter is p for p in top))
    return model


def trainer_with(reward, value, family="llama", **options):
    policy = tiny_model(family, layers=LAYERS)
    policy.generation_config.eos_token_id = list(range(0, VOCAB_SIZE, 12))
    settings = {"max_length": 6, "learning_rate": 1e-3, "num_epochs": 2, "num_layers_unfrozen": 1}
    config = PPOConfig(**(settings | options))
    return PPOTrainer(policy, value, reward, tiny_tokenizer(), "cpu", config=config)


def lower_weights(model):
    body = model.base_model
    return {p.data_ptr() for layer in layer_list(body)[:-1] for p in layer.parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("slots", [None, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_values_from_the_trunk_are_those_of_whole_models(family, slots):
    steps = []
    for kinds in ((RewardModel, ValueModel), (OwnReward, OwnValue)):
        models = [on_the_same_base(kind, family) for kind in kinds]
        trainer = trainer_with(*models, family, rollout_slots=slots)
        shared = kinds[0] is RewardModel
        assert trainer.scorer.reads_trunk == shared
        assert (
            trainer.critic.passes is not None and trainer.critic.passes.split is not None
        ) == shared
        found = [without_times(trainer.train_step(PROMPTS)) for _ in range(2)]
        # its own class has another name
        steps.append(
            [{k.replace("OwnReward", "RewardModel"): v for k, v in m.items()} for m in found]
        )
    for mine, other in zip(*steps, strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_one_trunk_in_memory():
    reward, value = on_the_same_base(RewardModel), on_the_same_base(ValueModel)
    trainer = trainer_with(reward, value)
    trunk_states = lower_weights(trainer.policy_model)
    assert lower_weights(reward.base_model) == lower_weights(value.base_model) == trunk_states
    embeddings = [m.base_model.base_model.embed_tokens.weight for m in (reward, value)]
    assert all(e is trainer.policy_model.model.embed_tokens.weight for e in embeddings)


def test_another_trunk_is_not_the_policys():
    reward, value = on_the_same_base(RewardModel), on_the_same_base(ValueModel, frozen=False)
    with torch.no_grad():
        reward.base_model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-6
    trainer = trainer_with(reward, value)
    assert not trainer.scorer.reads_trunk
    assert trainer.critic.passes.split is None, "its lower layers are trained"
    assert not lower_weights(reward.base_model) & lower_weights(trainer.policy_model)
    assert any(p.requires_grad for p in value.base_model.model.layers[0].parameters())
    shallow = trainer_with(RewardModel(tiny_model(layers=2), 64), on_the_same_base(ValueModel))
    assert not shallow.scorer.reads_trunk


@pytest.mark.parametrize("slots", [None, 2])
@pytest.mark.parametrize("options", [{}, {"critic": "head"}])
def test_the_trunk_of_last_tokens_changes_nothing_else(slots, options):
    value = None if options else on_the_same_base(ValueModel)
    trainer = trainer_with(on_the_same_base(RewardModel), value, rollout_slots=slots, **options)
    seeds = torch.arange(len(PROMPTS))
    whole = trainer.rollout(PROMPTS, seeds=seeds)
    trainer.engine.whole_trunk = False
    part = trainer.rollout(PROMPTS, seeds=seeds)
    assert len(set(whole.tokens.response_lengths.tolist())) > 1
    assert torch.equal(whole.tokens.response_ids, part.tokens.response_ids)
    for name in ("logprobs", "sampling_logprobs", *(["states"] if options else [])):
        torch.testing.assert_close(getattr(whole, name), getattr(part, name), rtol=1e-5, atol=1e-5)
        assert (getattr(whole, name)[~whole.tokens.response_mask] == 0).all()
    computed = trunk_states_in_batches(trainer.policy, whole.tokens, 1000)
    lengths = whole.tokens.response_lengths
    last = whole.trunk_states.response_first + lengths - 1
    found, expected = (
        whole.trunk_states.states[last],
        computed.states[computed.response_first + lengths - 1],
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (part.trunk_states.states[last] == 0).all()


def test_a_rollout_without_a_trunk_or_its_last_tokens_is_scored_the_same():
    trainer = trainer_with(on_the_same_base(RewardModel), on_the_same_base(ValueModel))
    seeds = torch.arange(len(PROMPTS))
    rollout = trainer.rollout(PROMPTS, seeds=seeds)
    expected = trainer.make_experience(rollout).scores
    trainer.engine.whole_trunk = False
    part = trainer.rollout(PROMPTS, seeds=seeds)
    assert rollout.trunk_states.whole
    assert not part.trunk_states.whole
    for other in (replace(rollout, trunk_states=None), part):
        torch.testing.assert_close(trainer.make_experience(other).scores, expected)


@pytest.mark.parametrize("k", [None, 1])
def test_a_shared_head_is_read_once(k, monkeypatch):
    models = [
        LanguageModel(tiny_model(layers=2, seed=seed), num_layers_unfrozen=k) for seed in (0, 1)
    ]
    tokens, calls = batch(), []
    trunk_states = None if k is None else models[0].compute_trunk_states(tokens)
    op = language_model.linear_logprobs

    def counted(*args, **kwargs):
        calls.append(1)
        return op(*args, **kwargs)

    monkeypatch.setattr(language_model, "linear_logprobs", counted)
    apart = logprobs_of_both(*models, tokens, trunk_states, temperature=0.7)
    for model, found in zip(models, apart, strict=True):
        forward = model.forward(tokens, trunk_states)
        expected = model.logprobs(forward, tokens, temperature=0.7).logprobs
        torch.testing.assert_close(found, expected)
    calls.clear()
    models[1].head.weight = models[0].head.weight
    together = logprobs_of_both(*models, tokens, trunk_states, temperature=0.7)
    assert len(calls) == 1
    torch.testing.assert_close(together[0], apart[0])
    expected = models[1].logprobs(models[1].forward(tokens, trunk_states), tokens, temperature=0.7)
    torch.testing.assert_close(together[1], expected.logprobs)


def test_recomputed_logprobs_read_a_frozen_head_once(monkeypatch):
    options = {"critic": "baseline", "trunk_dtype": "bfloat16"}
    trainer = trainer_with(count_letters, None, "gpt2", **options)  # its head is tied
    rollout, rows, op = trainer.rollout(PROMPTS), [], language_model.linear_logprobs

    def counted(hidden, *args, **kwargs):
        rows.append(len(hidden))
        return op(hidden, *args, **kwargs)

    monkeypatch.setattr(language_model, "linear_logprobs", counted)
    experience = trainer.make_experience(rollout)
    assert rows == [2 * len(PROMPTS)]
    torch.testing.assert_close(experience.old_logprobs, experience.ref_logprobs)
