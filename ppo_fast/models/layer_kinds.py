"""Kinds of layers that the kernel of decoding layers computes, each read in a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ppo_fast.models.gemma_layers import read_gemma_layer, why_not_gemma_like
from ppo_fast.models.gpt2_layers import read_gpt2_layer, why_not_gpt2_like
from ppo_fast.models.layer_parts import LayerParts
from ppo_fast.models.llama_layers import read_llama_layer, why_not_llama_like


class _Kind(NamedTuple):
    why_not: Callable[[nn.Module], str | None]
    read: Callable[[Any], LayerParts]


LLAMA = _Kind(why_not_llama_like, read_llama_layer)
GEMMA = _Kind(why_not_gemma_like, read_gemma_layer)
GPT2 = _Kind(why_not_gpt2_like, read_gpt2_layer)


def why_no_kind(layer: nn.Module) -> str | None:
    """Return the reason why the kernel does not compute ``layer``, or None if it does."""
    return _kind(layer).why_not(layer)


def read_layer(layer: nn.Module) -> LayerParts:
    """Read a layer for which ``why_no_kind`` returns None."""
    return _kind(layer).read(layer)


def _kind(layer: nn.Module) -> _Kind:
    """Return the kind that a layer is most like: ``why_not`` says why it is not of it."""
    if hasattr(layer, "ln_1"):
        return GPT2
    norm = getattr(layer, "input_layernorm", None)
    if hasattr(norm, "eps") and not hasattr(norm, "variance_epsilon") and hasattr(norm, "_norm"):
        return GEMMA
    return LLAMA
