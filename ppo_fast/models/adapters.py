"""Models with peft's adapters, told by their parts: peft itself is not needed here."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from ppo_fast.models.parts import base_of


class Adapted(NamedTuple):
    """A layer with an adapter, and where it sits."""

    parent: nn.Module
    name: str
    layer: Any


def adapted_layers(model: nn.Module) -> list[Adapted]:
    """The layers of ``model`` that have an adapter."""
    return [
        Adapted(parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if hasattr(child, "base_layer") and hasattr(child, "merge")
    ]


def without_new_adapters(model: nn.Module) -> nn.Module:
    """``model``, its own layers put back in place of those with adapters, if all of these are as
    LoRA starts (Hu et al. 2021, section 4.1): B = 0, so that they change nothing. An adapter that
    was trained before stays."""
    adapted = adapted_layers(model)
    if not adapted or not all(_adds_nothing(place.layer) for place in adapted):
        return model
    for parent, name, layer in adapted:
        parent.register_module(name, layer.base_layer)
    return base_of(model)


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """For the block, plain layers with their adapters merged into a copy of the weights stand in
    for those with adapters. Quantised layers stay as they are."""
    adapted = [a for a in adapted_layers(model) if a.layer.base_layer.weight.is_floating_point()]
    try:
        for parent, name, layer in adapted:
            merged = copy.deepcopy(layer)
            merged.merge()
            parent.register_module(name, merged.base_layer)
        yield
    finally:
        for parent, name, layer in adapted:
            parent.register_module(name, layer)


def _adds_nothing(layer: Any) -> bool:
    """Of a LoRA layer; of any other kind of adapter, and of DoRA, it cannot be told."""
    ups = getattr(layer, "lora_B", None)
    if not ups or any(getattr(layer, "use_dora", {}).values()):
        return False
    return not any(parameter.any() for parameter in ups.parameters())
