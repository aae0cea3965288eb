"""Parts of a transformers model: the model inside adapters, its body, its layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def base_of(model: nn.Module) -> Any:
    """Return the transformers model in a peft wrapper; any other model itself."""
    get_base_model: Any = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def body_of(model: nn.Module) -> nn.Module:
    """Return a causal LM's body, in a peft wrapper too; a bare body itself."""
    base = base_of(model)
    body = getattr(base, "base_model", base)
    if body is base and isinstance(base, PreTrainedModel):
        return getattr(base, "model", base)  # classes of Llama 4 call it by a name that it has not
    return body


def num_embeddings(model: Any) -> int:
    """Return how many tokens a model has embeddings of, in wrappers of adapters too."""
    try:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # a body of BART's kind
        embedding = None
    for part in (embedding, getattr(embedding, "base_layer", None)):
        weight = getattr(part, "weight", None)
        if isinstance(weight, Tensor):
            return weight.shape[0]
    return model.config.get_text_config().vocab_size


def layer_list(body: nn.Module | None) -> nn.ModuleList:
    """Return the body's transformer layers.

    Raises:
        ValueError: no module list has as many entries as the config names layers.
    """
    config: Any = getattr(body, "config", None)
    text_config = None if config is None else config.get_text_config()
    count = getattr(text_config, "num_hidden_layers", None)
    found: list[nn.ModuleList] = []
    for parent in body.modules() if body is not None else ():
        for child in parent.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                own: Any = getattr(parent, "config", None)
                if getattr(own, "model_type", "") == getattr(text_config, "model_type", None):
                    return child  # and not that of a part for images or sound
                found.append(child)
    if found:
        return found[0]
    raise ValueError(
        f"num_layers_unfrozen: found no list of {count} layers in {type(body).__name__}; "
        "use num_layers_unfrozen=None"
    )
