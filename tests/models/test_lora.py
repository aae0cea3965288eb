"""Policies with peft's adapters: who is the reference, what is trained, sampled and saved."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_adapters import adapted, base_model, split_names
from tiny_batch import batch
from tiny_models import tiny_tokenizer
from tiny_trainer import (
    PROMPTS,
    changed,
    count_letters,
    no_model_runs,
    true_logprobs,
    weights,
    without_times,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ppo_fast import PPOConfig, PPOTrainer, ValueModel
from ppo_fast.checkpointing import checkpoint
from ppo_fast.data.tokens import position_ids
from ppo_fast.models.adapters import adapted_layers, merged_adapters
from ppo_fast.models.heads import ValueHead
from ppo_fast.models.lora import with_lora
from ppo_fast.models.parts import body_of
from ppo_fast.models.transformers_internals import why_no_add_adapter

TOKENS = batch()
families = pytest.mark.parametrize("family", ["llama", "gpt2"])


def trainer_of(policy, value_model=None, **options):
    settings = {"critic": "head", "max_length": 6, "learning_rate": 1e-2, "num_epochs": 2}
    config = PPOConfig(**settings | options)
    return PPOTrainer(policy, value_model, count_letters, tiny_tokenizer(), "cpu", config=config)


def places(module, names):
    """Where these weights lie in memory."""
    parameters = dict(module.named_parameters())
    return {name: parameters[name].data_ptr() for name in names}


def test_with_lora_adapts_every_product_of_the_layers():
    policy = with_lora(base_model("gpt2"), 4, 1)
    names = {place.name for place in adapted_layers(policy)}
    assert names == {"c_attn", "c_proj", "c_fc"}
    assert all(".h.2." in name for name in split_names(policy)[0])
    layer = next(iter(adapted_layers(policy))).layer
    assert layer.scaling == {"default": 2.0}
    assert layer.lora_A["default"].out_features == 4


def tiny(family, **sizes):
    sizes |= {"hidden_size": 32, "vocab_size": 307, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()


def test_with_lora_adapts_products_of_other_classes_and_no_routers():
    """Falcon's are FalconLinear; PhiMoE's routers are linear layers to Python."""
    policy = with_lora(tiny("falcon", num_hidden_layers=2), 4)
    names = {place.name for place in adapted_layers(policy)}
    assert names == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    policy = with_lora(tiny("phimoe", num_hidden_layers=2, intermediate_size=48), 4)
    assert {place.name for place in adapted_layers(policy)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }


def test_with_lora_adapts_a_body_without_a_list_of_layers():
    model = base_model("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="found no list of 5 layers"):
        with_lora(model, 4, 1)
    adapted_everywhere = list(adapted_layers(with_lora(model, 4)))
    assert len(adapted_everywhere) == 3 * 7
    assert "lm_head" not in {place.name for place in adapted_everywhere}


# The reference


@families
def test_of_new_adapters_the_plain_base_is_the_reference(family):
    policy = adapted(family)
    trainer = trainer_of(policy)
    reference = trainer.reference_model
    assert type(reference) is type(base_model(family))
    assert not list(adapted_layers(reference))
    assert len(list(adapted_layers(policy))) == 3 * (7 if family == "llama" else 4)
    held = {p.data_ptr() for p in policy.parameters()}
    assert all(p.data_ptr() in held for p in reference.parameters())
    before = true_logprobs(reference, TOKENS)
    assert torch.equal(before, true_logprobs(base_model(family), TOKENS))
    assert trainer.train_step(PROMPTS)["kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert abs(trainer.train_step(PROMPTS)["kl_divergence"]) > 1e-3
    assert torch.equal(true_logprobs(reference, TOKENS), before)
    assert not torch.equal(true_logprobs(policy, TOKENS), before)


@families
@pytest.mark.parametrize("kind", [{"trained": True}, {"dora": True}], ids=["trained", "DoRA"])
def test_of_other_adapters_a_frozen_copy_is_the_reference(family, kind):
    policy = adapted(family, **kind)
    trainer = trainer_of(policy)
    reference = trainer.reference_model
    adapters, others = split_names(policy)
    assert split_names(reference) == (adapters, others)
    assert places(reference, others) == places(policy, others)
    mine, theirs = places(reference, adapters), places(policy, adapters)
    assert not set(mine.values()) & set(theirs.values())
    before = weights(reference)
    assert trainer.train_step(PROMPTS)["kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert abs(trainer.train_step(PROMPTS)["kl_divergence"]) > 1e-3
    assert not changed(reference, before)
    assert changed(policy, before) <= adapters


# What is trained, and what sampled


@families
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_adapters_alone_are_trained_and_what_is_sampled_is_theirs(family, dora):
    policy = adapted(family, dora=dora)
    trainer = trainer_of(policy)
    assert trainer.policy.fused
    before, head = weights(policy), weights(trainer.critic.module)
    for _ in range(3):
        assert trainer.train_step(PROMPTS)["first_max_log_ratio"] < 2e-5
    assert changed(policy, before) == split_names(policy)[0]
    assert changed(trainer.critic.module, head)
    rollout = trainer.rollout(PROMPTS)
    merged = copy.deepcopy(policy).merge_and_unload()
    assert not list(adapted_layers(merged))
    expected = true_logprobs(merged, rollout.tokens)
    assert (rollout.logprobs - expected).abs().max() < 2e-5
    assert (true_logprobs(base_model(family), rollout.tokens) - expected).abs().max() > 0.1


@families
@pytest.mark.parametrize("k", [1, 2])
def test_adapters_above_a_trunk_are_trained_as_without_one(family, k):
    runs = []
    for unfrozen in (k, None):
        trainer = trainer_of(adapted(family, k), num_layers_unfrozen=unfrozen)
        runs.append((trainer, [trainer.train_step(PROMPTS) for _ in range(3)]))
    (top, found), (whole, expected) = runs
    assert top.policy.split is not None
    alike(found, expected)
    alike_weights(top.policy_model, whole.policy_model)
    alike_weights(top.critic.module, whole.critic.module)


class Value(nn.Module):
    """A value model that starts as ``body`` and shares nothing."""

    def __init__(self, body):
        super().__init__()
        self.body, self.head = copy.deepcopy(body), ValueHead(32)

    def forward(self, input_ids, attention_mask):
        places = position_ids(attention_mask)
        return self.head(
            self.body(input_ids, attention_mask=attention_mask, position_ids=places)[0]
        )


@families
def test_a_top_critic_trains_adapters_of_its_own(family):
    runs = []
    for critic in ("top", "model"):
        policy = adapted(family, 2)
        value_model = Value(body_of(policy)) if critic == "model" else None
        unfrozen = 2 if critic == "top" else None
        trainer = trainer_of(policy, value_model, critic=critic, num_layers_unfrozen=unfrozen)
        start = weights(trainer.critic.module)
        runs.append((trainer, [trainer.train_step(PROMPTS) for _ in range(3)]))
        moved = changed(trainer.critic.module, start)
        assert moved == split_names(trainer.critic.module)[0] | {
            "head.linear.weight",
            "head.linear.bias",
        }
    (top, found), (whole, expected) = runs
    alike(found, expected)
    alike_weights(top.policy_model, whole.policy_model)
    alike_weights(top.critic.module, whole.critic.module)
    own, body = top.critic.module.body, body_of(top.policy_model)
    adapters, others = split_names(own)
    assert places(own, others) == places(body, others)
    assert not set(places(own, adapters).values()) & set(places(body, adapters).values())


def alike(found, expected):
    for mine, other in zip(found, expected, strict=True):
        for name in ("policy_loss", "value_loss", "kl_divergence", "policy_grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


def alike_weights(one, other):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4, msg=name)


def test_a_top_whose_lowest_layer_trains_nothing_is_refused():
    mend = r"num_layers_unfrozen: got 2, .* no weights to train; lower the number, or unfreeze"
    with no_model_runs(), pytest.raises(ValueError, match=mend):
        trainer_of(adapted(k=1), num_layers_unfrozen=2)
    plain = base_model()
    trainer_of(plain, num_layers_unfrozen=1)  # which has frozen the others
    with no_model_runs(), pytest.raises(ValueError, match=mend):
        trainer_of(plain, num_layers_unfrozen=2)


def test_a_top_within_a_former_top_is_trained():
    for policy in (base_model(), adapted()):
        for k in (2, 1):
            trainer = trainer_of(policy, num_layers_unfrozen=k)
        before = weights(policy)
        trainer.train_step(PROMPTS)
        moved = changed(policy, before)
        assert moved
        assert all(
            "layers.2." in name or name.endswith("norm.weight")
            for name in moved
            if "lm_head" not in name
        )


# Adapters in other places


@pytest.mark.parametrize("k", [None, 1])
def test_an_adapter_on_the_head_means_the_ordinary_path(k):
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    policy = get_peft_model(base_model(), config)
    trainer = trainer_of(policy, num_layers_unfrozen=k)
    assert not trainer.policy.fused
    before = weights(policy)
    for _ in range(2):
        metrics = trainer.train_step(PROMPTS)
        assert metrics["first_max_log_ratio"] < 2e-5
    moved = changed(policy, before)
    assert {"lora_" in name for name in moved} == {True}
    assert any("lm_head" in name for name in moved)
    assert any("q_proj" in name for name in moved)


@pytest.mark.skipif(why_no_add_adapter() is not None, reason=str(why_no_add_adapter()))
def test_adapters_that_transformers_put_in():
    policy = base_model()
    policy.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    trainer = trainer_of(policy)
    assert not list(adapted_layers(trainer.reference_model))
    before = weights(policy)
    for step in range(2):
        metrics = trainer.train_step(PROMPTS)
        assert metrics["first_max_log_ratio"] < 2e-5
        assert (abs(metrics["kl_divergence"]) > 1e-6) == (step > 0)
    assert changed(policy, before) == split_names(policy)[0]


@families
def test_a_value_model_with_adapters(family):
    value_model = ValueModel(adapted(family), 32)
    trainer = trainer_of(base_model(), value_model, critic="model")
    before = weights(value_model)
    trainer.train_step(PROMPTS)
    trainer.train_step(PROMPTS)
    head = {name for name in before if name.startswith("value_head")}
    assert changed(value_model, before) == split_names(value_model)[0] | head


def test_virtual_tokens_are_refused():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    policy = get_peft_model(base_model(), config)
    with no_model_runs(), pytest.raises(TypeError, match=r"PromptTuningConfig.* as LoRA does"):
        trainer_of(policy)


# Checkpoints


@pytest.mark.parametrize("k", [None, 1])
def test_a_run_goes_on_from_the_adapters_alone(tmp_path, k):
    options = {"num_layers_unfrozen": k}
    trainer = trainer_of(adapted(k=k), **options)
    trainer.train_step(PROMPTS)
    path = trainer.save_checkpoint(tmp_path, 1)
    saved, start = checkpoint.load(path)["models"]["policy"], weights(trainer.policy_model)
    assert saved.keys() == split_names(trainer.policy_model)[0]
    assert path.stat().st_size < sum(w.nbytes for w in base_model().parameters())
    expected = without_times(trainer.train_step(PROMPTS))

    other = adapted(k=k, seed=1)
    assert changed(other, weights(adapted(k=k)))
    resumed = trainer_of(other, **options)
    assert resumed.load_checkpoint(path) == 1
    assert not changed(resumed.policy_model, start)
    assert without_times(resumed.train_step(PROMPTS)) == expected
    assert not changed(resumed.policy_model, weights(trainer.policy_model))


# Adapters merged for a rollout


def test_merging_is_undone_whatever_happens(monkeypatch):
    policy = adapted(trained=True)
    layers, before = [place.layer for place in adapted_layers(policy)], weights(policy)

    def untouched():
        found = [place.layer for place in adapted_layers(policy)]
        same = all(a is b for a, b in zip(found, layers, strict=True))
        return same and not changed(policy, before)

    def amid():
        with merged_adapters(policy):
            assert not list(adapted_layers(policy))
            raise RuntimeError("amid")

    with pytest.raises(RuntimeError, match="amid"):
        amid()
    assert untouched()
    calls, merge = [], type(layers[0]).merge

    def fails_later(self, *args):
        calls.append(self)
        if len(calls) == 3:
            raise RuntimeError("no room")
        merge(self, *args)

    monkeypatch.setattr(type(layers[0]), "merge", fails_later)
    with pytest.raises(RuntimeError, match="no room"), merged_adapters(policy):
        pytest.fail("not reached")
    assert untouched()


@families
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_merging_changes_no_draw(family, dora, monkeypatch):
    trainer = trainer_of(adapted(family, trained=True, dora=dora))
    calls = []
    for place in adapted_layers(trainer.policy_model):
        place.layer.register_forward_pre_hook(lambda *_: calls.append(1))
    seeds = torch.arange(len(PROMPTS))
    merged = trainer.rollout(PROMPTS, seeds=seeds)
    assert not calls
    decode = sys.modules["ppo_fast.rollout.decode"]
    monkeypatch.setattr(decode, "merged_adapters", lambda _: nullcontext())
    apart = trainer.rollout(PROMPTS, seeds=seeds)
    assert calls
    assert torch.equal(merged.tokens.response_ids, apart.tokens.response_ids)
    torch.testing.assert_close(merged.logprobs, apart.logprobs, rtol=1e-5, atol=2e-5)


def test_merged_in_float32_nothing_is_rounded():
    policy = with_lora(base_model().bfloat16(), 4)
    places = adapted_layers(policy)
    for place in places:
        torch.nn.init.normal_(place.layer.lora_B["default"].weight, std=1e-4)
    before = weights(policy)
    dtypes = {name: weight.dtype for name, weight in before.items()}
    deltas = [place.layer.get_delta_weight("default") for place in places]
    with merged_adapters(policy, in_float32=True):
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
        for place, delta in zip(places, deltas, strict=True):
            merged = getattr(place.parent, place.name).weight
            added = merged - place.layer.base_layer.weight.float()
            assert (added - delta).norm() < 1e-3 * delta.norm()
    assert {name: weight.dtype for name, weight in weights(policy).items()} == dtypes
    assert not changed(policy, before)
    with merged_adapters(policy):  # as a rollout computes
        assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
