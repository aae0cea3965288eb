"""Layers of Gemma's kind, for the kernel that computes one in a call (fused_layers.py).

They have the parts of Llama's layers. Their norms multiply by 1 + weight, and their gates are
GELUs. Gemma 2 and 3 also normalise what attention and the MLP add. What is read here has tests in
tests/models/test_gemma_layers.py.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ppo_fast.models.layer_parts import (
    LayerParts,
    why_not_activation,
    why_not_weights,
)
from ppo_fast.models.llama_layers import (
    LAYER_NAMES,
    LAYER_OPTIONAL,
    LAYER_WEIGHTS,
    why_not_with_norms,
)
from ppo_fast.models.precision import HALF
from ppo_fast.models.transformers_internals import attention_of

# Names of norms by the kernel's names, where layers have four (Gemma 2 and 3); Gemma has the two of
# Llama's layers.
FOUR_NORMS = {
    "attention_norm": "input_layernorm.weight",
    "attention_out_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "mlp_out_norm": "post_feedforward_layernorm.weight",
}
GEMMA_NAMES = LAYER_NAMES | {
    "_norm", "attn_logit_softcapping", "float", "post_feedforward_layernorm",
    "pre_feedforward_layernorm", "type_as",
}  # fmt: skip


def _weights(layer: nn.Module) -> dict[str, str]:
    four = hasattr(layer, "pre_feedforward_layernorm")
    return LAYER_WEIGHTS | FOUR_NORMS if four else LAYER_WEIGHTS


def why_not_gemma_like(layer: nn.Module) -> str | None:
    """Return the reason why ``layer`` is not of the Gemma kind, or None if it is.

    A layer of that kind has the parts of a Gemma layer and nothing else that computes.
    """
    reason = why_not_weights(layer, _weights(layer).values(), LAYER_OPTIONAL.values())
    if reason is not None:
        return reason
    activation = dict(layer.named_modules()).get("mlp.act_fn")
    if reason := why_not_activation(activation, {"gelu_tanh"}, "GELU by tanh"):
        return reason
    return why_not_with_norms(layer, _why_not_norm, GEMMA_NAMES)


def _why_not_norm(norm: nn.Module) -> str | None:
    kind: Any = type(norm)
    return _why_not_gemma_norm(kind)


@lru_cache
def _why_not_gemma_norm(kind: Any) -> str | None:
    """Return the reason why a class of norms computes otherwise than Gemma's, or None.

    Gemma 4's multiplies by the weight itself.
    """
    x = torch.linspace(-1.0, 2.0, 8, device="cpu")
    try:
        norm = kind(8, eps=0.5).to("cpu", torch.float32)
        norm.weight.data = torch.linspace(0.5, 1.5, 8, device="cpu")
        with torch.no_grad():
            found = norm(x)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        return f"computes in a way of its own ({type(error).__name__}: {error})"
    expected = x * torch.rsqrt(x.pow(2).mean() + 0.5) * (1.0 + torch.linspace(0.5, 1.5, 8))
    if found.shape == x.shape and torch.allclose(found, expected):
        return None
    return "computes other numbers than Gemma's"


def read_gemma_layer(layer: Any) -> LayerParts:
    """Read a layer for which ``why_not_gemma_like`` returns None."""
    attention, parameters = layer.self_attn, dict(layer.named_parameters())
    weights: dict[str, Tensor | None] = {}
    eps = {}
    for name, path in (_weights(layer) | LAYER_OPTIONAL).items():
        weights[name] = weight = parameters.get(path)
        if name.endswith("norm"):
            norm = layer.get_submodule(path.removesuffix(".weight")) if weight is not None else None
            eps[name.removesuffix("norm") + "eps"] = getattr(norm, "eps", 0.0)
            weights[name] = None if weight is None else _one_more(weight)
    return LayerParts(
        weights,
        eps,
        attention.layer_idx,
        attention.head_dim,
        attention.scaling,
        activation="gelu_tanh",
        softcap=_softcap(attention),
    )


def _one_more(weight: Tensor) -> Tensor:
    """Return 1 + ``weight``, in float32 where the weight is in half precision."""
    weight = weight.detach()
    return 1.0 + (weight.float() if weight.dtype in HALF else weight)


def _softcap(attention: Any) -> float | None:
    """Return the bound of attention's scores.

    Gemma 3 has the setting, but does not use it, nor does scaled_dot_product_attention.
    """
    code = inspect.unwrap(type(attention).forward).__code__
    used = "attn_logit_softcapping" in code.co_names and attention_of(attention.config) == "eager"
    return attention.attn_logit_softcapping if used else None
