"""What gpt2_layers.py assumes about layers of GPT-2's kind, one test per assumption."""

from __future__ import annotations

import pytest
import torch
from llama_like import layers
from tiny_models import tiny_model
from torch import nn

from ppo_fast.models.gpt2_layers import PARAMETERS, read_gpt2_layer, why_not_gpt2_like
from ppo_fast.models.layer_kinds import read_layer, why_no_kind


def gpt2_layer():
    return layers(tiny_model("gpt2"))[1]


def test_names_of_weights():
    assert {name for name, _ in gpt2_layer().named_parameters()} == set(PARAMETERS)


def test_a_layer_is_of_the_kind():
    assert why_not_gpt2_like(gpt2_layer()) is None
    assert why_no_kind(gpt2_layer()) is None


def test_queries_keys_and_values_are_thirds_of_one_product():
    layer = gpt2_layer()
    read = read_layer(layer)
    x = torch.randn(2, 1, 64)
    with torch.no_grad():
        layer.attn.c_attn.bias.uniform_()
        expected = layer.attn.c_attn(x).split(layer.attn.split_size, dim=2)
        for name, product in zip("qkv", expected, strict=True):
            found = x @ read.weights[f"{name}_weight"] + read.weights[f"{name}_bias"]
            torch.testing.assert_close(found, product)


def test_settings():
    layer = gpt2_layer()
    layer.ln_1.eps, layer.ln_2.eps = 0.25, 0.5
    read = read_gpt2_layer(layer)
    assert (read.cache_index, read.head_size, read.scaling) == (1, 16, 0.25)
    assert read.eps == {"attention_eps": 0.25, "mlp_eps": 0.5}
    assert (read.activation, read.inputs_first, read.layer_norm) == ("gelu_tanh", True, True)
    assert not read.rotary


def test_the_weights_are_the_layers_own():
    """A rollout sees what the update before it has changed."""
    layer = gpt2_layer()
    read = read_gpt2_layer(layer)
    assert read.weights["k_weight"].data_ptr() == layer.attn.c_attn.weight[:, 64:].data_ptr()
    assert read.weights["gate_weight"].data_ptr() == layer.mlp.c_fc.weight.data_ptr()


def add_encoder_attention(layer):
    layer.crossattention = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: setattr(x.mlp, "act", nn.GELU()), "its activation is GELU, not GELU by tanh"),
        (lambda x: setattr(x.mlp, "c_fc", nn.Linear(64, 64)), "its mlp.c_fc is a Linear"),
        (lambda x: setattr(x.mlp, "dropout", nn.Identity()), "its mlp.dropout is a Identity"),
        (add_encoder_attention, "it has a crossattention.bias"),
        (lambda x: setattr(x, "ln_1", nn.LayerNorm(64, bias=False)), "it has no ln_1.bias"),
        (lambda x: delattr(x.attn, "scaling"), "its attn has no scaling"),
        (lambda x: x.mlp.train(), "its mlp.dropout drops numbers"),
    ],
)
def test_why_a_layer_is_not_of_the_kind_any_more(change, reason):
    layer = gpt2_layer()
    change(layer)
    assert why_not_gpt2_like(layer) == reason


def test_a_layer_whose_code_uses_another_name_is_not_of_the_kind():
    layer = gpt2_layer()

    class Scaled(type(layer.mlp)):
        def forward(self, hidden_states):
            return self.c_proj(self.act(self.c_fc(hidden_states))) * self.scale

    layer.mlp.__class__ = Scaled
    assert why_not_gpt2_like(layer) == "its mlp uses scale"
