"""The layers that a rollout replaces in a model: the numbers stay the same, and the model is
unchanged afterwards."""

from __future__ import annotations

import threading

import pytest
import torch
from tiny_models import FAMILIES, PAD_ID, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.setup import disable_dropout
from ppo_fast.rollout import Sampling, decode
from ppo_fast.rollout.speedups.few_rows import few_row_products
from ppo_fast.rollout.speedups.fused_layers import fused_layers
from ppo_fast.rollout.speedups.slot_check import layers_can_be_fused

ONE = {"prompt_ids": [[3, 9]], "sampling": Sampling(6), "seeds": torch.arange(1)}
ONE |= {"eos_ids": [], "pad_id": PAD_ID}
FUSED = {"llama": 3, "qwen2": 3, "gpt2": 3, "gemma2": 3, "gpt_neox": 0, "cohere": 0}


def state_of(model):
    """Return the attributes and hooks of every module, which a patch could leave changed."""
    return [
        (name, dict(vars(module)), module.training, list(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_which_layers_are_fused(family):
    model = LanguageModel(tiny_model(family, layers=3))
    with fused_layers(model) as layers:
        assert len(layers) == FUSED[family]
    assert layers_can_be_fused(model) == (len(layers) > 0)


def test_a_layer_with_the_structure_but_other_numbers_is_not_fused(monkeypatch):
    """Helium rotates other pairs of numbers, which the names in its layers do not show."""
    monkeypatch.setattr("ppo_fast.models.llama_layers._why_not_llama_rotation", lambda *_: None)
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 131, "vocab_size": 307}
    config = AutoConfig.for_model("helium", **sizes)
    model = LanguageModel(AutoModelForCausalLM.from_config(config).eval())
    with fused_layers(model) as layers:
        assert len(layers) == 2, "by its structure it could be"
    assert not layers_can_be_fused(model)


@pytest.mark.parametrize("what", ["hook", "forward", "half", "bias of a norm"])
def test_changed_and_half_precision_layers_are_not_fused(what):
    raw = tiny_model("llama")
    layer = raw.model.layers[0]
    if what == "hook":
        layer.mlp.register_forward_hook(lambda *_: None)
    if what == "forward":
        own = layer.self_attn.q_proj.forward
        layer.self_attn.q_proj.forward = lambda x: 2 * own(x)
    if what == "half":
        raw.half()
    if what == "bias of a norm":
        layer.input_layernorm.bias = torch.nn.Parameter(torch.zeros(64))
    with fused_layers(LanguageModel(raw)) as layers:
        assert len(layers) == (0 if what == "half" else 1)


@pytest.mark.parametrize(("family", "dtype"), [("gpt2", torch.float64), ("gemma2", torch.float32)])
def test_a_rollout_by_fused_layers_equals_one_by_the_models_own(monkeypatch, family, dtype):
    raw = tiny_model(family, layers=3, seed=3).to(dtype)
    with torch.no_grad():
        for name, parameter in raw.named_parameters():
            if "bias" in name or "norm" in name or "ln_" in name:
                parameter.uniform_(0.5, 1.5)
    arguments = {"seeds": torch.arange(4), "eos_ids": [], "pad_id": PAD_ID}
    prompts = [[5, 6, 7, 8], [9], [5, 6, 7, 8], [11, 12]]

    def rollout():
        model = LanguageModel(raw)
        return layers_can_be_fused(model), decode(model, prompts, Sampling(20), **arguments)

    fused, found = rollout()
    monkeypatch.setattr("ppo_fast.rollout.speedups.fused_layers.why_no_kind", lambda _: "by test")
    not_fused, expected = rollout()
    assert fused
    assert not not_fused
    assert torch.equal(found.tokens.response_ids, expected.tokens.response_ids)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-4, rtol=1e-4)


def test_nothing_is_fused_under_autocast():
    model = LanguageModel(tiny_model("llama"))
    with torch.autocast("cpu", dtype=torch.bfloat16), fused_layers(model) as layers:
        assert len(layers) == 0
        with few_row_products(model.model):
            assert "forward" not in vars(model.model.lm_head)


def test_a_body_without_a_list_of_layers_decodes_as_it_is():
    raw = tiny_model("llama")
    expected = decode(LanguageModel(raw), **ONE)
    raw.model.layers = torch.nn.ModuleList([*raw.model.layers, torch.nn.Identity()])
    model = LanguageModel(raw)
    with fused_layers(model) as layers:
        assert len(layers) == 0
    assert torch.equal(decode(model, **ONE).tokens.response_ids, expected.tokens.response_ids)


class Raised(BaseException):
    """An error that is not an Exception, like KeyboardInterrupt."""


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("error", [None, ValueError, Raised])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_it_was_after_a_rollout(family, error, training):
    raw = tiny_model(family, layers=3)
    disable_dropout(raw.train(training))
    model = LanguageModel(raw, num_layers_unfrozen=1)
    calls = []

    def fail(*_):
        calls.append(1)
        if error is not None and len(calls) > 12:
            raise error

    raw.get_input_embeddings().register_forward_hook(fail)
    before = state_of(raw)
    weights = {name: p.clone() for name, p in raw.state_dict().items()}
    arguments = {"seeds": torch.arange(2), "eos_ids": [], "pad_id": PAD_ID}
    if error is None:
        decode(model, [[5, 6, 7], [8]], Sampling(20), **arguments)
    else:
        with pytest.raises(error):
            decode(model, [[5, 6, 7], [8]], Sampling(20), **arguments)
    assert state_of(raw) == before
    assert all(torch.equal(p, weights[name]) for name, p in raw.state_dict().items())


def test_two_threads_decode_two_models():
    models = [LanguageModel(tiny_model("llama", seed=seed)) for seed in range(2)]
    arguments = {"seeds": torch.arange(3), "eos_ids": [], "pad_id": PAD_ID}

    def run(model):
        return decode(model, [[5], [6, 7], [8]], Sampling(15), **arguments).tokens.response_ids

    expected = [run(model) for model in models]
    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: run(models[i])})) for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(2))
