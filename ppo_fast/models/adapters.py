"""Models with peft's adapters, recognised by their parts, so that peft itself is not needed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from ppo_fast.models.parts import base_of
from ppo_fast.models.quantized import bits_of, to_float32


class Adapted(NamedTuple):
    """A layer with an adapter, its parent module and its name there."""

    parent: nn.Module
    name: str
    layer: Any


def adapted_layers(model: nn.Module) -> list[Adapted]:
    """Return the layers of ``model`` that have an adapter."""
    return [
        Adapted(parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if hasattr(child, "base_layer") and hasattr(child, "merge")
    ]


def without_new_adapters(model: nn.Module) -> nn.Module:
    """Remove adapters that are all untrained LoRA, and return the model without its peft wrapper.

    Untrained LoRA has B = 0 (Hu et al. 2021, section 4.1) and changes nothing. If any adapter
    counts as trained, all stay and ``model`` is returned as it is.
    """
    adapted = adapted_layers(model)
    if not adapted or not all(_adds_nothing(one.layer) for one in adapted):
        return model
    for parent, name, layer in adapted:
        parent.register_module(name, layer.base_layer)
    return base_of(model)


@contextmanager
def merged_adapters(model: nn.Module, *, in_float32: bool = False) -> Iterator[None]:
    """Temporarily replace layers with adapters by plain layers, the adapters merged in.

    The merged weights are copies. Quantised layers stay as they are, and so do layers with a
    ``forward`` of the instance, which a copy would not bind to its own weights.

    Args:
        model: a model with adapters; of one without, nothing changes.
        in_float32: merge in float32, and hold all half-precision weights of the model in float32
            within the block. Rounding to half precision removes most of a small change, and
            transformers loads a saved model in one dtype.
    """
    adapted = [
        a
        for a in adapted_layers(model)
        if _is_mergeable(a.layer) and not any("forward" in vars(part) for part in a.layer.modules())
    ]
    converts = in_float32 and bool(adapted)
    held = [(t, t.data) for t in [*model.parameters(), *model.buffers()]] if converts else []
    try:
        for parent, name, layer in adapted:
            merged = copy.deepcopy(layer)
            if converts:
                to_float32(merged)
            merged.merge()
            parent.register_module(name, merged.base_layer)
        if converts:
            to_float32(model)
        yield
    finally:
        for tensor, data in held:
            if tensor.dtype != data.dtype:
                tensor.data = data
        for parent, name, layer in adapted:
            parent.register_module(name, layer)


def _is_mergeable(layer: Any) -> bool:
    """Return False for quantised weights, and for experts' weights, which have wrappers alone."""
    weight = getattr(layer.base_layer, "weight", None)
    if bits_of(layer.base_layer) is not None:  # 4 bits may be stored as bfloat16
        return False
    return weight is not None and weight.is_floating_point()


def _adds_nothing(layer: Any) -> bool:
    """Return True for a LoRA layer with B = 0. Other adapters, and DoRA, count as trained."""
    ups = getattr(layer, "lora_B", None)
    if not ups or any(getattr(layer, "use_dora", {}).values()):
        return False
    return not any(parameter.any() for parameter in ups.parameters())
