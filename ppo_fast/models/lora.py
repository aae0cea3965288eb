"""LoRA adapters for a policy that has none, for the command line and the memory plans."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ppo_fast.models.parts import body_of, layer_list
from ppo_fast.models.transformers_internals import Conv1D

# How classes are named that are linear layers to Python but return no product [..., out_features].
NO_PRODUCTS = ("Router", "GroupedLinear")


def lora_config(model: nn.Module, rank: int, num_layers_unfrozen: int | None = None) -> Any:
    """Return peft's LoraConfig for every linear layer in the transformer's layers.

    With ``num_layers_unfrozen``, only that many top layers get adapters. Without it, all of a body
    that has no list of its layers gets them. alpha is twice the rank.

    Raises:
        ValueError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("LoRA needs peft: pip install 'ppo_fast[lora]'") from error
    body = body_of(model)
    try:
        layers: Any = layer_list(body)
    except ValueError:
        if num_layers_unfrozen is not None:
            raise
        layers = [body]
    first = len(layers) - (num_layers_unfrozen or len(layers))
    top = {id(module) for layer in layers[first:] for module in layer.modules()}
    chosen = {
        path: type(module)
        for path, module in model.named_modules()
        if id(module) in top and _is_product(model, path, module)
    }
    names = {path.rpartition(".")[2] for path in chosen}
    ambiguous = layers == [body] or any(
        path.rpartition(".")[2] in names and not _is_product(model, path, module)
        for path, module in model.named_modules()
    )
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        # names alone where they mean nothing else: a saved adapter is then short
        target_modules=sorted(chosen if ambiguous else names),
        layers_to_transform=None if ambiguous else list(range(first, len(layers))),
        fan_in_fan_out=Conv1D in chosen.values(),  # how GPT-2 stores weights
        task_type="CAUSAL_LM",
    )


def _is_product(model: nn.Module, path: str, module: nn.Module) -> bool:
    """Return whether a module is a plain product, and neither a router nor one that peft refuses.

    Of Mamba's layers, peft refuses those whose fused kernels would pass the adapters by.
    """
    if not isinstance(module, (nn.Linear, Conv1D)) or type(module).__name__.endswith(NO_PRODUCTS):
        return False
    parent, _, name = path.rpartition(".")
    is_mixer = hasattr(model.get_submodule(parent), "conv1d")
    return not (is_mixer and name in ("out_proj", "conv1d"))


def with_lora(model: Any, rank: int, num_layers_unfrozen: int | None = None) -> Any:
    """Return ``model`` in a peft wrapper, with the adapters of ``lora_config``."""
    return with_adapter(model, lora_config(model, rank, num_layers_unfrozen))


def with_adapter(model: Any, config: Any) -> Any:
    """Return ``model`` in a peft wrapper, with new adapters of this config."""
    from peft import get_peft_model

    with warnings.catch_warnings():  # of a property that peft asks transformers for
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config)
