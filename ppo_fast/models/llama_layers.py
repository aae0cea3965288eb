"""Layers of Llama's kind, for the kernel that computes one in a call (fused_layers.py).

What is read here is no more public than what stands in transformers_internals.py, and has tests in
the same place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ppo_fast.models.layer_parts import (
    LayerParts,
    why_not_activation,
    why_not_code,
    why_not_neutral,
    why_not_weights,
)

# Names of a layer's weights by the kernel's names; a layer may lack those of LAYER_OPTIONAL.
LAYER_WEIGHTS = {
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    **{f"{x}_weight": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"{x}_weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
}
LAYER_OPTIONAL = {
    **{f"{x}_bias": f"self_attn.{x}_proj.bias" for x in "qkvo"},
    **{f"{x}_bias": f"mlp.{x}_proj.bias" for x in ("gate", "up", "down")},
    **{f"{x}_norm": f"self_attn.{x}_norm.weight" for x in "qk"},
}

# Every name that the forward of a layer of Llama's kind, of its attention, MLP and norms uses. One
# that uses another name computes something that the kernel does not know, as Ministral 3's
# attention does, whose scale depends on the position.
LAYER_NAMES = {
    "ALL_ATTENTION_FUNCTIONS", "_attn_implementation", "act_fn", "apply_rotary_pos_emb",
    "attention_dropout", "config", "contiguous", "down_proj", "dropout", "dtype",
    "eager_attention_forward", "float32", "functional", "gate_proj", "get_interface", "getattr",
    "head_dim", "input_layernorm", "is_sliding", "k_norm", "k_proj", "layer_idx", "mean", "mlp",
    "nn", "num_heads", "num_key_value_heads", "o_proj", "post_attention_layernorm", "pow",
    "q_norm", "q_proj", "residual_dropout", "residual_multiplier", "reshape", "rsqrt",
    "scaling", "self_attn", "shape", "size", "sliding_window", "to", "torch", "training",
    "transpose", "up_proj", "update", "use_qk_norm", "use_rope", "v_proj", "variance_epsilon",
    "view", "weight",
}  # fmt: skip
# Of these, attributes that stand for something that the kernel does not compute, unless they have
# this value.
NEUTRAL = {"residual_multiplier": 1.0, "use_rope": 1}


def why_not_llama_like(layer: nn.Module) -> str | None:
    """Return the reason why ``layer`` is not of the Llama kind, or None if it is.

    A layer of that kind has the parts of a Llama layer and nothing else that computes.
    """
    reason = why_not_weights(layer, LAYER_WEIGHTS.values(), LAYER_OPTIONAL.values())
    if reason is not None:
        return reason
    modules = dict(layer.named_modules())
    if reason := why_not_activation(modules.get("mlp.act_fn"), {"silu"}, "SiLU"):
        return reason
    return why_not_with_norms(layer, why_not_llama_norm, LAYER_NAMES)


def why_not_llama_norm(norm: nn.Module) -> str | None:
    """Return what a norm of a class that is named RMSNorm lacks of Llama's, or None."""
    return None if hasattr(norm, "variance_epsilon") else "has no variance_epsilon"


def why_not_with_norms(
    layer: nn.Module, why_not_norm: Callable[[nn.Module], str | None], known: Collection[str]
) -> str | None:
    """Return the reason why a layer with the names of Llama's weights computes another thing.

    None: it does not.

    Args:
        layer: a layer whose activation and names of weights are known to the kernel.
        why_not_norm: returns the reason why the kernel does not know a norm, or None.
        known: names that the code of such layers uses; see ``why_not_code``.
    """
    modules = {name: module for name, module in layer.named_modules() if name}
    for name, module in modules.items():
        if list(module.children()) or type(module) is nn.Linear or name == "mlp.act_fn":
            continue
        if not type(module).__name__.endswith("RMSNorm"):
            return f"its {name} is a {type(module).__name__}"
        if reason := why_not_norm(module):
            return f"its {name} {reason}"
    for name in ("head_dim", "scaling", "layer_idx"):
        if not hasattr(modules["self_attn"], name):
            return f"its self_attn has no {name}"
    for name, module in {"forward": layer, **modules}.items():
        computes = list(module.children()) or type(module).__name__.endswith("RMSNorm")
        if computes and (reason := why_not_code(name, module, known)):
            return reason
        if reason := why_not_neutral(name, module, NEUTRAL):
            return reason
    attention: Any = modules["self_attn"]
    names = inspect.unwrap(type(attention).forward).__globals__
    return _why_not_llama_rotation(names.get("apply_rotary_pos_emb"), attention.head_dim)


@lru_cache
def _why_not_llama_rotation(rotate: Any, head_size: int) -> str | None:
    """Return the reason why ``rotate`` turns heads otherwise than Llama's attention does, or None.

    Llama's turns number i of a head with number i + half of its size; Helium's and ERNIE 4.5's turn
    neighbours.
    """
    if rotate is None:
        return "its self_attn has no apply_rotary_pos_emb"
    half = head_size // 2
    x = torch.arange(1.0, 2 * half + 1, device="cpu").reshape(1, 1, 1, -1)
    angles = torch.linspace(0.1, 1.0, half, device="cpu").repeat(2)[None, None]
    cos, sin = angles.cos(), angles.sin()
    expected = x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin
    try:
        found = rotate(x, x, cos, sin)[0]
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        return f"its self_attn rotates in a way of its own ({type(error).__name__}: {error})"
    if found.shape == x.shape and torch.allclose(found, expected):
        return None
    return "its self_attn rotates other pairs of numbers than Llama's"


def read_llama_layer(layer: Any) -> LayerParts:
    """Read a layer for which ``why_not_llama_like`` returns None."""
    attention, parameters = layer.self_attn, dict(layer.named_parameters())
    norms = {
        "attention_eps": layer.input_layernorm,
        "mlp_eps": layer.post_attention_layernorm,
        "q_eps": getattr(attention, "q_norm", None),
        "k_eps": getattr(attention, "k_norm", None),
    }
    return LayerParts(
        {name: parameters.get(path) for name, path in (LAYER_WEIGHTS | LAYER_OPTIONAL).items()},
        {name: getattr(norm, "variance_epsilon", 0.0) for name, norm in norms.items()},
        attention.layer_idx,
        attention.head_dim,
        attention.scaling,
    )
