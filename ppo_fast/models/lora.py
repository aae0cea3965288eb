"""LoRA adapters for a policy that has none, for the command line and the memory plans."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ppo_fast.models.parts import body_of, layer_list
from ppo_fast.models.transformers_internals import Conv1D


def lora_config(model: nn.Module, rank: int, num_layers_unfrozen: int | None = None) -> Any:
    """Return peft's LoraConfig for every linear layer in the transformer's layers.

    With ``num_layers_unfrozen``, only that many top layers get adapters. alpha is twice the rank.

    Raises:
        ValueError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("LoRA needs peft: pip install 'ppo_fast[lora]'") from error
    layers = layer_list(body_of(model))
    top = layers[-(num_layers_unfrozen or len(layers)) :]
    products = {
        name.rpartition(".")[2]: type(module)
        for name, module in top.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    first = len(layers) - len(top)
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=sorted(products),
        fan_in_fan_out=Conv1D in products.values(),  # how GPT-2 stores weights
        layers_to_transform=list(range(first, len(layers))),
        task_type="CAUSAL_LM",
    )


def with_lora(model: Any, rank: int, num_layers_unfrozen: int | None = None) -> Any:
    """Return ``model`` in a peft wrapper, with the adapters of ``lora_config``."""
    return with_adapter(model, lora_config(model, rank, num_layers_unfrozen))


def with_adapter(model: Any, config: Any) -> Any:
    """Return ``model`` in a peft wrapper, with new adapters of this config."""
    from peft import get_peft_model

    with warnings.catch_warnings():  # of a property that peft asks transformers for
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config)
