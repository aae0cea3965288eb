"""What gemma_layers.py assumes about layers of Gemma's kind, one test per assumption."""

from __future__ import annotations

import pytest
import torch
from llama_like import first_layer
from torch import nn

from ppo_fast.models.gemma_layers import read_gemma_layer, why_not_gemma_like
from ppo_fast.models.layer_kinds import why_no_kind

each_gemma = pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])


@each_gemma
def test_a_layer_is_of_the_kind(family):
    assert why_not_gemma_like(first_layer(family)) is None
    assert why_no_kind(first_layer(family)) is None


@each_gemma
def test_norms_multiply_by_one_more_than_their_weights(family):
    layer = first_layer(family)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "norm" in name:
                parameter.uniform_()
    read = read_gemma_layer(layer)
    norms = {"attention_norm": layer.input_layernorm}
    if family == "gemma":
        norms["mlp_norm"] = layer.post_attention_layernorm
    else:
        norms["attention_out_norm"] = layer.post_attention_layernorm
        norms["mlp_norm"] = layer.pre_feedforward_layernorm
        norms["mlp_out_norm"] = layer.post_feedforward_layernorm
    if family == "gemma3_text":
        norms |= {f"{x}_norm": getattr(layer.self_attn, f"{x}_norm") for x in "qk"}
    given = {name for name in read.weights if name.endswith("norm")}
    assert {name for name in given if read.weights[name] is not None} == norms.keys()
    for name, norm in norms.items():
        torch.testing.assert_close(read.weights[name], 1.0 + norm.weight)
        assert read.eps[f"{name.removesuffix('_norm')}_eps"] == norm.eps == 1e-6


def test_the_bound_of_scores_is_read_where_attention_uses_it():
    layer = first_layer("gemma2")
    assert layer.self_attn.attn_logit_softcapping == 50.0
    assert read_gemma_layer(layer).softcap == 50.0
    layer.self_attn.config._attn_implementation = "sdpa"
    assert read_gemma_layer(layer).softcap is None, "scaled_dot_product_attention has none"
    layer = first_layer("gemma3_text")
    layer.self_attn.attn_logit_softcapping = 50.0
    layer.self_attn.config._attn_implementation = "eager"
    assert read_gemma_layer(layer).softcap is None, "its attention does not use it"


class PlainNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self._norm(x.float()) * self.weight


PlainNorm.__name__ = "PlainRMSNorm"


def test_norms_of_other_numbers_are_not_of_the_kind():
    """Gemma 4's norms have the same names and multiply by the weight itself."""
    layer = first_layer("gemma")
    layer.input_layernorm = PlainNorm(32)
    reason = "its input_layernorm computes other numbers than Gemma's"
    assert why_not_gemma_like(layer) == reason
    assert why_no_kind(layer) == reason


def test_another_activation_is_not_of_the_kind():
    layer = first_layer("gemma")
    layer.mlp.act_fn = nn.GELU()
    assert why_not_gemma_like(layer) == "its activation is GELU, not GELU by tanh"
