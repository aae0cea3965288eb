"""Weights and settings of a layer for the decoding kernel, and checks of all kinds of layers.

llama_layers.py, gemma_layers.py and gpt2_layers.py read layers of their kinds; layer_kinds.py
chooses among them.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ppo_fast.models.quantized import bits_of, quantized_layers

# Activations that the kernel computes, by the classes of transformers and torch that compute them.
ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
}


class LayerParts(NamedTuple):
    """Weights and settings of a layer, for the kernel (csrc/kernels/decode_layer.hpp).

    weights: by the kernel's names; None: the layer has none. Matrices are [outputs, inputs], or
        [inputs, outputs] with ``inputs_first``; each may be a part of a parameter.
    eps: epsilons of its norms, by the kernel's names.
    cache_index: its index in the cache's list of layers.
    head_size, scaling: those of its attention.
    activation: a value of ACTIVATIONS.
    inputs_first: whether matrices are stored transposed, as those of GPT-2.
    layer_norm: whether its norms subtract the mean; else they are RMS norms.
    rotary: whether a body calls it with ``position_embeddings``, the cosines and sines [1 or n, 1,
        head size] of its rows' positions.
    softcap: bound c of attention's scores c tanh(x / c); None: they have none.
    """

    weights: Mapping[str, Tensor | None]
    eps: Mapping[str, float]
    cache_index: int
    head_size: int
    scaling: float
    activation: str = "silu"
    inputs_first: bool = False
    layer_norm: bool = False
    rotary: bool = True
    softcap: float | None = None


def why_not_weights(
    layer: nn.Module, needed: Collection[str], optional: Collection[str]
) -> str | None:
    """Return the reason why a layer's parameters are not those of a kind, or None if they are."""
    if quantized := quantized_layers(layer):
        return f"its weights are in {bits_of(quantized[0])} bits"
    names = {name for name, _ in layer.named_parameters()}
    if missing := sorted(set(needed) - names):
        return f"it has no {missing[0]}"
    if more := sorted(names - set(needed) - set(optional)):
        return f"it has a {more[0]}"
    return None


def why_not_activation(module: Any, kinds: Collection[str], expected: str) -> str | None:
    """Return the reason why a module is none of the activations of ``kinds``, or None."""
    name = type(module).__name__
    known = ACTIVATIONS.get(name) in kinds
    return None if known else f"its activation is {name}, not {expected}"


def why_not_code(name: str, module: nn.Module, known: Collection[str]) -> str | None:
    """Return the reason why a module's forward is not known to the kernel, or None if it is.

    Args:
        name: the module's name, for the reason.
        module: a layer, or a module in it.
        known: every name that a forward of this kind uses. One that uses another name computes
            something that the kernel does not know.
    """
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None:
        return f"the code of its {name} cannot be read"
    if more := sorted(set(code.co_names) - set(known)):
        return f"its {name} uses {', '.join(more)}"
    return None


def why_not_neutral(name: str, module: nn.Module, neutral: Mapping[str, Any]) -> str | None:
    """Return which attribute of ``neutral`` has another value, or None if none has.

    These attributes stand for something that the kernel does not compute, but with these values.
    """
    for attribute, value in neutral.items():
        if getattr(module, attribute, value) != value:
            return f"its {name} has {attribute} {getattr(module, attribute)}"
    return None
