"""Rollouts with int8 weights: what they draw from, how the update corrects it, what is refused."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
from tiny_adapters import adapted
from tiny_models import FAMILIES, PAD_ID, tiny_model, tiny_tokenizer
from tiny_trainer import (
    PROMPTS,
    changed,
    count_letters,
    experience_of,
    tiny_trainer,
    true_logprobs,
    weights,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ppo_fast import PPO, PPOConfig, Rollout
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.transformers_internals import Conv1D
from ppo_fast.nonfinite import NotFiniteError
from ppo_fast.ops import quantize_rows
from ppo_fast.rollout import Sampling, decode
from ppo_fast.rollout.local_engine import LocalEngine
from ppo_fast.rollout.speedups.int8_check import check_int8

ARGUMENTS = {"seeds": torch.arange(3), "eos_ids": [], "pad_id": PAD_ID}
IDS = [[5, 6, 7, 8], [9], [11, 12]]


def rounded(raw):
    """Return a copy whose linear layers, the LM head among them, have the weights of int8."""
    model = copy.deepcopy(raw)
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, Conv1D)):
            rows = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
            numbers, scale = quantize_rows(rows, impl="reference")
            weight = numbers * scale[:, None]
            # a parameter of its own: the head's may be the embedding's too
            layer.weight = nn.Parameter(weight.T if isinstance(layer, Conv1D) else weight)
    return model


def int8_trainer(**options):
    return tiny_trainer(rollout_weights="int8", **{"critic": "head"} | options)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_the_rounded_weights(family):
    """Those of fused layers, and of linear layers in others."""
    raw = tiny_model(family, layers=3)
    before = weights(raw)
    found = decode(LanguageModel(raw), IDS, Sampling(12), int8=True, **ARGUMENTS)
    assert not changed(raw, before)
    expected = true_logprobs(rounded(raw), found.tokens)
    torch.testing.assert_close(found.logprobs.double(), expected, atol=2e-4, rtol=1e-4)
    exact = true_logprobs(raw, found.tokens)
    assert (found.logprobs - exact).abs().max() > 2e-3, "the weights are not in int8"


@pytest.mark.parametrize("fails", [False, True])
def test_a_rollout_after_it_has_the_models_weights(fails):
    raw = tiny_model()
    model = LanguageModel(raw)
    expected = decode(model, IDS, Sampling(12), **ARGUMENTS).logprobs
    decode(model, IDS, Sampling(2), int8=True, **ARGUMENTS)
    if fails:
        hook = raw.get_input_embeddings().register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decode(model, IDS, Sampling(2), int8=True, **ARGUMENTS)
        hook.remove()
    assert torch.equal(decode(model, IDS, Sampling(12), **ARGUMENTS).logprobs, expected)


def test_of_a_model_with_a_cache_of_its_own():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 307, "num_hidden_layers": 3, "block_ff_dim": 48}
    layers = ["conv", "full_attention", "conv"]
    torch.manual_seed(0)
    raw = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("lfm2", layer_types=layers, initializer_range=0.15, **sizes)
    ).eval()
    found = decode(LanguageModel(raw), IDS, Sampling(8), int8=True, **ARGUMENTS)
    expected = true_logprobs(rounded(raw), found.tokens)
    torch.testing.assert_close(found.logprobs.double(), expected, atol=2e-4, rtol=1e-4)
    assert (found.logprobs - true_logprobs(raw, found.tokens)).abs().max() > 1e-3


def test_adapters_are_merged_first():
    policy = adapted(trained=True)
    found = decode(LanguageModel(policy), IDS, Sampling(12), int8=True, **ARGUMENTS)
    merged = copy.deepcopy(policy).merge_and_unload()
    expected = true_logprobs(rounded(merged), found.tokens)
    torch.testing.assert_close(found.logprobs.double(), expected, atol=2e-4, rtol=1e-4)


OPTIONS = {
    "plain": {},
    "bfloat16": {"compute_dtype": "bfloat16"},
    "trunk": {"critic": "top", "num_layers_unfrozen": 1},
    "value model": {"critic": "model"},
    "a trunk's head": {"num_layers_unfrozen": 1, "trunk_dtype": "bfloat16"},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_step_is_corrected(case):
    trainer = int8_trainer(**OPTIONS[case])
    rollout, experience = experience_of(trainer)
    assert rollout.states is None
    assert rollout.trunk_states is None
    mask, metrics = rollout.tokens.response_mask, experience.metrics
    ratios = (experience.old_logprobs - rollout.sampling_logprobs)[mask]
    assert ratios.abs().max() > 1e-3
    torch.testing.assert_close(experience.weights[mask], ratios.exp().clamp(max=2.0))
    assert 0 < metrics["sampling_kl_k3"] < 0.01
    assert 0.9 < metrics["effective_sample_size"] < 1
    assert metrics["sampling_logprob_difference"] > 0
    if case in ("plain", "value model"):
        true = true_logprobs(trainer.policy_model, rollout.tokens)
        torch.testing.assert_close(experience.old_logprobs.double(), true, atol=1e-5, rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trainer.train_step(PROMPTS)["first_max_log_ratio"] < 1e-4


@pytest.mark.parametrize("critic", ["head", "top"])
def test_an_update_knows_the_responses_alone(critic):
    """The same responses and sampler's log-probs, sampled elsewhere, give the same weights."""
    options = {"critic": critic} | ({"num_layers_unfrozen": 1} if critic == "top" else {})
    trainer = int8_trainer(**options)
    rollout, experience = experience_of(trainer)
    trainer.update(experience)
    other = tiny_trainer(importance="truncate", **options)
    tokens, lengths = rollout.tokens, rollout.tokens.response_lengths.tolist()
    given = Rollout.from_tokens(
        [
            row[:p].tolist()
            for row, p in zip(tokens.sequences(), tokens.prompt_lengths, strict=True)
        ],
        [row[:n].tolist() for row, n in zip(tokens.response_ids, lengths, strict=True)],
        pad_id=PAD_ID,
        sampling_logprobs=[
            row[:n].tolist() for row, n in zip(rollout.sampling_logprobs, lengths, strict=True)
        ],
        finished=rollout.finished.tolist(),
    )
    other.update(other.make_experience(given))
    assert not changed(other.policy_model, weights(trainer.policy_model))
    assert not changed(other.critic.module, weights(trainer.critic.module))


def test_which_importance_is_implied():
    assert PPOConfig().importance_kind() is None
    assert PPOConfig(rollout_weights="int8").importance_kind() == "truncate"
    assert PPOConfig(rollout_weights="int8", importance="mask").importance_kind() == "mask"
    assert PPOConfig(rollout_weights="int8", ratio_to="sampler").importance_kind() is None


def test_the_ratio_to_the_sampler():
    trainer = int8_trainer(ratio_to="sampler")
    rollout, experience = experience_of(trainer)
    assert experience.weights is None
    mask = rollout.tokens.response_mask
    assert torch.equal(experience.old_logprobs[mask], rollout.sampling_logprobs[mask])


def test_it_is_said_once(caplog):
    trainer = int8_trainer()
    with caplog.at_level(logging.INFO, logger="ppo_fast"):
        trainer.rollout(PROMPTS)
        trainer.rollout(PROMPTS)
    share, difference = check_int8(trainer.policy)
    assert 0 < difference < 0.1
    said = f"int8 rollouts (of {share:.0%} of the weights: logits differ by {difference:.1e})"
    assert sum(said in record.message for record in caplog.records) == 1


def test_weights_that_are_not_finite_show():
    raw = tiny_model()
    model = LanguageModel(raw)
    decode(model, IDS, Sampling(2), int8=True, **ARGUMENTS)
    with torch.no_grad():
        raw.model.layers[1].mlp.down_proj.weight[3, 4] = torch.nan
    with pytest.raises(NotFiniteError):
        decode(model, IDS, Sampling(2), int8=True, **ARGUMENTS)


def test_without_the_compiled_extension(monkeypatch):
    monkeypatch.setenv("PPO_FAST_IMPL", "reference")
    with pytest.raises(ValueError, match=r"rollout_weights='int8': reference operations: .* needs"):
        int8_trainer()


def test_a_policy_without_such_layers():
    policy = tiny_model().double()
    config = PPOConfig(rollout_weights="int8")
    with pytest.raises(ValueError, match="rollout_weights='int8': LlamaForCausalLM has no such"):
        PPO(policy, tiny_tokenizer(), count_letters, config=config)


def test_a_policy_in_4_bits(monkeypatch):
    where = "ppo_fast.rollout.speedups.int8_products"
    monkeypatch.setattr(f"{where}.quantized_layers", lambda model: [model])
    monkeypatch.setattr(f"{where}.bits_of", lambda _: 4)
    with pytest.raises(ValueError, match="the policy's weights are in 4 bits already; it needs"):
        int8_trainer()


@pytest.mark.parametrize("asked", [None, "int8"])
def test_an_engine_that_decodes_with_other_weights(asked):
    trainer = tiny_trainer(critic="head")
    engine = LocalEngine(
        trainer.policy, eos_ids=list, pad_id=PAD_ID, int8=asked is None, max_prompt_tokens=99
    )
    words = "use rollout_weights='int8'" if asked is None else "it needs engine=None"
    with pytest.raises(ValueError, match=f"^rollout_weights.*{words}"):
        PPO(
            tiny_model(),
            tiny_tokenizer(),
            count_letters,
            engine=engine,
            config=PPOConfig(critic="head", rollout_weights=asked),
        )
