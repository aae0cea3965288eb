"""What llama_layers.py assumes about layers of Llama's kind, one test per assumption."""

from __future__ import annotations

import inspect

import pytest
from llama_like import each_llama_like, first_layer, layers
from tiny_models import tiny_model
from torch import nn
from transformers import (
    CONFIG_MAPPING,
)

from ppo_fast.models import llama_layers
from ppo_fast.models.layer_parts import ACTIVATIONS


@each_llama_like
def test_names_of_weights(family):
    layer = first_layer(family)
    names = {name for name, _ in layer.named_parameters()}
    assert set(llama_layers.LAYER_WEIGHTS.values()) <= names
    assert names <= {*llama_layers.LAYER_WEIGHTS.values(), *llama_layers.LAYER_OPTIONAL.values()}
    read = llama_layers.read_llama_layer(layer)
    assert read.weights["k_weight"] is layer.self_attn.k_proj.weight
    assert (read.weights["q_bias"] is not None) == (family == "qwen2")
    assert (read.weights["q_norm"] is not None) == (family == "qwen3")


@each_llama_like
def test_name_of_the_activation(family):
    assert ACTIVATIONS[type(first_layer(family).mlp.act_fn).__name__] == "silu"


@each_llama_like
def test_a_norm_has_variance_epsilon(family):
    layer = first_layer(family)
    layer.input_layernorm.variance_epsilon = 0.25
    eps = llama_layers.read_llama_layer(layer).eps
    assert eps["attention_eps"] == 0.25
    assert eps["mlp_eps"] in (1e-5, 1e-6)
    assert eps["q_eps"] == (1e-6 if family == "qwen3" else 0)
    assert type(layer.input_layernorm).__name__.endswith("RMSNorm")


@each_llama_like
@pytest.mark.parametrize(("name", "value"), [("layer_idx", 0), ("head_dim", 8)])
def test_attention_has_its_index_and_head_size(family, name, value):
    assert getattr(first_layer(family).self_attn, name) == value


@each_llama_like
def test_attention_has_its_scaling(family):
    assert llama_layers.read_llama_layer(first_layer(family)).scaling == pytest.approx(8**-0.5)


@each_llama_like
def test_a_layer_of_these_families_is_llama_like(family):
    assert llama_layers.why_not_llama_like(first_layer(family)) is None


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "it has no input_layernorm.weight"),
        ("gemma2", "it has a post_feedforward_layernorm.weight"),
        ("cohere", "it has no post_attention_layernorm.weight"),
    ],
)
def test_why_a_layer_is_not_llama_like(family, reason):
    assert llama_layers.why_not_llama_like(layers(tiny_model(family))[0]) == reason


def test_why_a_llama_layer_is_not_llama_like_any_more():
    def changed(change):
        layer = first_layer("llama")
        change(layer)
        return llama_layers.why_not_llama_like(layer)

    assert changed(lambda x: setattr(x.mlp, "act_fn", nn.GELU())) == (
        "its activation is GELU, not SiLU"
    )
    assert changed(lambda x: delattr(x.input_layernorm, "variance_epsilon")) == (
        "its input_layernorm has no variance_epsilon"
    )
    assert changed(lambda x: setattr(x, "more", nn.Identity())) == "its more is a Identity"
    assert changed(lambda x: delattr(x.self_attn, "scaling")) == "its self_attn has no scaling"


@pytest.mark.parametrize("family", ["helium", "ernie4_5", "ernie4_5_moe"])
def test_a_layer_that_rotates_other_pairs_is_not_llama_like(family):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {family}")
    assert llama_layers.why_not_llama_like(first_layer(family)) == (
        "its self_attn rotates other pairs of numbers than Llama's"
    )


def test_an_attention_whose_rotation_cannot_be_called_is_not_llama_like(monkeypatch):
    layer = first_layer("llama")
    namespace = inspect.unwrap(type(layer.self_attn).forward).__globals__
    monkeypatch.setitem(namespace, "apply_rotary_pos_emb", lambda q, k, positions: (q, k))
    reason = llama_layers.why_not_llama_like(layer)
    assert reason.startswith("its self_attn rotates in a way of its own (TypeError: ")
    monkeypatch.delitem(namespace, "apply_rotary_pos_emb")
    assert llama_layers.why_not_llama_like(layer) == "its self_attn has no apply_rotary_pos_emb"
