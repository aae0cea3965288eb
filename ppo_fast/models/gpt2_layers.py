"""Layers of GPT-2's kind, for the kernel that computes one in a call (fused_layers.py).

Their products are Conv1D modules, whose weights are stored transposed, queries, keys and values in
one. Their norms subtract the mean, the MLP has no gate, and positions are added before the layers.
What is read here has tests in tests/models/test_gpt2_layers.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ppo_fast.models.layer_parts import (
    ACTIVATIONS,
    LayerParts,
    why_not_activation,
    why_not_code,
    why_not_neutral,
    why_not_weights,
)
from ppo_fast.models.transformers_internals import Conv1D

NORMS, PRODUCTS = ("ln_1", "ln_2"), ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
PARAMETERS = [f"{name}.{kind}" for name in NORMS + PRODUCTS for kind in ("weight", "bias")]

# Every name that the forward of a layer of GPT-2's kind, of its attention and MLP uses; see
# why_not_code. Those of attention to an encoder are not reached in a layer without its weights.
LAYER_NAMES = {
    "ALL_ATTENTION_FUNCTIONS", "EncoderDecoderCache", "ValueError", "_attn_implementation",
    "_upcast_and_reordered_attn", "act", "attn", "attn_dropout", "c_attn", "c_fc", "c_proj",
    "config", "contiguous", "cross_attention_cache", "crossattention", "dropout",
    "eager_attention_forward", "get", "get_interface", "hasattr", "head_dim", "is_updated",
    "isinstance", "keys", "layer_idx", "layers", "ln_1", "ln_2", "ln_cross_attn", "mlp", "p",
    "q_attn", "reorder_and_upcast_attn", "reshape", "resid_dropout", "scaling",
    "self_attention_cache", "shape", "split", "split_size", "training", "transpose", "update",
    "values", "view",
}  # fmt: skip
NEUTRAL = {"is_cross_attention": False}


def why_not_gpt2_like(layer: nn.Module) -> str | None:
    """Return the reason why ``layer`` is not of the GPT-2 kind, or None if it is.

    A layer of that kind has the parts of a GPT-2 layer and nothing else that computes.
    """
    if (reason := why_not_weights(layer, PARAMETERS, ())) is not None:
        return reason
    modules = {name: module for name, module in layer.named_modules() if name}
    for name, module in modules.items():
        if list(module.children()) or name == "mlp.act":
            continue
        expected = nn.LayerNorm if name in NORMS else Conv1D if name in PRODUCTS else nn.Dropout
        if type(module) is not expected:
            return f"its {name} is a {type(module).__name__}"
        if type(module) is nn.Dropout and module.training and module.p > 0:
            return f"its {name} drops numbers"
    if reason := why_not_activation(modules.get("mlp.act"), {"gelu_tanh", "silu"}, "GELU by tanh"):
        return reason
    for name in ("head_dim", "scaling", "layer_idx", "num_heads"):
        if not hasattr(modules["attn"], name):
            return f"its attn has no {name}"
    for name, module in {"forward": layer, "attn": modules["attn"], "mlp": modules["mlp"]}.items():
        if reason := why_not_code(name, module, LAYER_NAMES):
            return reason
        if reason := why_not_neutral(name, module, NEUTRAL):
            return reason
    return None


def read_gpt2_layer(layer: Any) -> LayerParts:
    """Read a layer for which ``why_not_gpt2_like`` returns None."""
    attention, mlp = layer.attn, layer.mlp
    weights: dict[str, Tensor | None] = {
        "attention_norm": layer.ln_1.weight,
        "attention_norm_bias": layer.ln_1.bias,
        "mlp_norm": layer.ln_2.weight,
        "mlp_norm_bias": layer.ln_2.bias,
    }
    # one product gives queries, keys and values, a third of its outputs each
    third = attention.c_attn.weight.shape[1] // 3
    for i, name in enumerate("qkv"):
        outputs = slice(i * third, (i + 1) * third)
        weights[f"{name}_weight"] = attention.c_attn.weight[:, outputs]
        weights[f"{name}_bias"] = attention.c_attn.bias[outputs]
    for name, product in (("o", attention.c_proj), ("gate", mlp.c_fc), ("down", mlp.c_proj)):
        weights |= {f"{name}_weight": product.weight, f"{name}_bias": product.bias}
    return LayerParts(
        {name: None if weight is None else weight.detach() for name, weight in weights.items()},
        {"attention_eps": layer.ln_1.eps, "mlp_eps": layer.ln_2.eps},
        attention.layer_idx,
        attention.head_dim,
        attention.scaling,
        activation=ACTIVATIONS[type(mlp.act).__name__],
        inputs_first=True,
        layer_norm=True,
        rotary=False,
    )
