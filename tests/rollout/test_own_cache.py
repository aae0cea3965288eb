"""Models that keep more than keys and values by token decode with their own cache, or without."""

from __future__ import annotations

import logging

import peft
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS, count_letters, true_logprobs
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from ppo_fast import PPO, PPOConfig
from ppo_fast.data.sampling import Sampling
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.transformers_internals import cache_argument, next_with_own_cache
from ppo_fast.rollout import decode
from ppo_fast.rollout.own_cache import own_cache

SIZES = {"vocab_size": 307, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None, "num_hidden_layers": 3}
FAMILIES = {
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8, "state_size": 8},
    "lfm2": {
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention", "conv"],
        "block_ff_dim": 48,
    },
    "falcon_h1": {
        "num_key_value_heads": 2,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 8,
        "mamba_d_head": 4,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "num_hidden_layers": 2,
        "window_size": 4,
    },
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
}


def model_of(family):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {family}")
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3 if weight.dim() > 1 else 1)
    return model


def ppo_of(model, **options):
    settings = {"critic": "head", "max_length": 9, "temperature": 0.8} | options
    return PPO(model, tiny_tokenizer(), count_letters, config=PPOConfig(**settings))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"num_layers_unfrozen": 1}], ids=["all", "trunk"])
def test_families(family, options):
    ppo = ppo_of(model_of(family), **options)
    own = own_cache(ppo.policy)
    assert own is not None
    assert (own.why_no_cache is None) == (family != "rwkv")
    prompts = [*PROMPTS, PROMPTS[0], "She thinks"]
    rollout = ppo.rollout(prompts, seeds=torch.tensor([3, 1, 4, 1, 5, 9, 2]))
    truth = true_logprobs(ppo.policy.model, rollout.tokens, 0.8)
    torch.testing.assert_close(rollout.logprobs.double(), truth, rtol=0, atol=2e-4)
    metrics = ppo.step(prompts).metrics
    assert metrics["first_max_log_ratio"] < 1e-3


@pytest.mark.parametrize("family", ["mamba2", "lfm2"])
def test_their_own_cache_has_no_other_dtype(family):
    words = "kv_cache_dtype: got 'bfloat16', but .* does not decode by slots in one KV cache"
    with pytest.raises(ValueError, match=words):
        ppo_of(model_of(family), kv_cache_dtype="bfloat16")


@pytest.mark.parametrize("keeps", ["some rows", "all rows"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_that_have_ended_leave_the_others(family, keeps, monkeypatch):
    counts, own = [], next_with_own_cache

    def counting(model, ids, *args, **kwargs):
        counts.append(len(ids))
        return own(model, ids, *args, **kwargs)

    def fails(cache, rows):
        raise ValueError("no rows of it can be kept")

    if keeps == "all rows":
        monkeypatch.setattr("ppo_fast.rollout.own_cache.keep_rows", fails)
    model = LanguageModel(model_of(family))
    has_cache = own_cache(model).why_no_cache is None
    monkeypatch.setattr("ppo_fast.rollout.own_cache.next_with_own_cache", counting)
    lengths, seeds = [2, 7, 4], torch.arange(3)
    options = {"seeds": seeds, "eos_ids": [], "pad_id": 1, "max_lengths": lengths}
    rollout = decode(model, [[3, 4], [5, 6], [7, 8]], Sampling(7), **options)
    stay = keeps == "all rows" and has_cache
    assert counts == ([3] * 7 if stay else [3, 3, 2, 2, 1, 1, 1])
    assert rollout.tokens.response_lengths.tolist() == lengths
    truth = true_logprobs(model.model, rollout.tokens, 1.0)
    torch.testing.assert_close(rollout.logprobs.double(), truth, rtol=0, atol=2e-4)


@pytest.mark.parametrize("wrap", ["adapters", "compiled"])
def test_a_wrapper_keeps_the_cache(wrap):
    model = model_of("lfm2")
    if wrap == "adapters":
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["w1"]))
    else:
        model = torch.compile(model, backend="eager")
    assert own_cache(LanguageModel(model)).why_no_cache is None


def test_a_lack_of_memory_is_not_remembered(monkeypatch):
    def full(model):
        raise torch.OutOfMemoryError("out of memory")

    model = LanguageModel(tiny_model(layers=2))
    with monkeypatch.context() as m:
        m.setattr("ppo_fast.rollout.own_cache.check_layers", full)
        with pytest.raises(torch.OutOfMemoryError):
            own_cache(model)
    assert own_cache(model) is None


def test_it_draws_what_slots_draw(monkeypatch):
    """The same model, decoded both ways: the same tokens whatever the slots, stops and lengths."""
    model = LanguageModel(tiny_model(layers=2))
    ids = [[5, 6], [7], [8, 9, 10], [11, 12], [5, 6]]
    sampling = Sampling(12, top_k=30, min_new_tokens=2, stop_token_ids=tuple(range(0, 307, 9)))
    options = {"seeds": torch.arange(5), "eos_ids": [0, 5], "pad_id": 1}
    options["max_lengths"] = [12, 3, 12, 7, 1]
    expected = decode(model, ids, sampling, **options)
    monkeypatch.setattr(
        "ppo_fast.rollout.own_cache.check_layers", lambda model: [][0]
    )  # an IndexError
    for slots in (None, 1, 2):
        other = LanguageModel(model.model)
        found = decode(other, ids, sampling, slots=slots, **options)
        assert own_cache(other).why_no_slots == "IndexError: list index out of range"
        assert torch.equal(found.tokens.response_ids, expected.tokens.response_ids)
        assert torch.equal(found.tokens.response_lengths, expected.tokens.response_lengths)
        assert torch.equal(found.finished, expected.finished)
        torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            found.sampling_logprobs, expected.sampling_logprobs, rtol=1e-4, atol=1e-5
        )


def test_a_cache_that_gives_other_logits_is_not_used(caplog):
    model = tiny_model(layers=2)
    own, cache = model.model.layers[1].forward, cache_argument(model)

    def forgets(hidden_states, *args, **kwargs):
        if kwargs.get(cache) is not None and hidden_states.shape[1] == 1:
            hidden_states = hidden_states + 1
        return own(hidden_states, *args, **kwargs)

    model.model.layers[1].forward = forgets
    with caplog.at_level(logging.WARNING, "ppo_fast"):
        rollout = decode(
            LanguageModel(model),
            [[3], [4, 5]],
            Sampling(4),
            seeds=torch.arange(2),
            eos_ids=[],
            pad_id=0,
        )
    expected = LanguageModel(model).logprobs(
        LanguageModel(model).forward(rollout.tokens), rollout.tokens, temperature=1.0
    )
    torch.testing.assert_close(rollout.logprobs, expected.logprobs, rtol=0, atol=2e-5)


def test_the_paths_not_taken_are_said(caplog):
    with caplog.at_level(logging.INFO, "ppo_fast"):
        ppo_of(model_of("rwkv")).step(PROMPTS)
    (record,) = [r for r in caplog.records if "fast paths" in r.getMessage()]
    assert record.levelno == logging.WARNING
    assert "no slots in one KV cache" in record.getMessage()
    assert "every step computes all tokens before it" in record.getMessage()
