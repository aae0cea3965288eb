"""Parts of transformers beyond its public interface that this package uses.

These are names of arguments, attributes and weights, and what models do with them. Each item says
why it is needed. ``tests/models/test_transformers_internals.py`` has a test for each, so that the
test which fails after a new release of transformers names what moved. No other module of this
package names one of these things, but ``llama_layers.py``, ``gemma_layers.py`` and
``gpt2_layers.py``, which read layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor, nn

# Decoding keeps keys and values in a Cache of its own (rollout/slots.py). A model's layers call
# ``update`` of the cache's layers; its mask code calls ``get_seq_length`` and ``get_mask_sizes``.
from transformers import Cache as Cache

# Settings of ``generate_batch``, since 5.4; before that they were arguments.
from transformers import ContinuousBatchingConfig as ContinuousBatchingConfig
from transformers.cache_utils import DynamicLayer as DynamicLayer

# GPT-2's products: linear layers whose weight is stored transposed.
from transformers.pytorch_utils import Conv1D as Conv1D


def cache_argument(module: nn.Module) -> str:
    """Return the name of the KV cache argument of a model, body or layer.

    It is ``cache`` since transformers 5.24, ``past_key_values`` before that and in models that are
    not transformers' own. A wrapper that hands its arguments on takes the name of the module that
    it wraps.
    """
    for part in module.modules():
        parameters = inspect.signature(type(part).forward).parameters
        for name in ("cache", "past_key_values"):
            if name in parameters:
                return name
    return "cache"


def output_of(module: Any, **arguments: Any) -> Any:
    """Call a model or a body, and return its output with names.

    With ``config.return_dict=False`` it would be a tuple, which some models cannot read from their
    own body.
    """
    config = getattr(module, "config", None)
    if getattr(config, "return_dict", True):
        return module(**arguments)
    assert config is not None
    config.return_dict = True
    try:
        return module(**arguments)
    finally:
        config.return_dict = False


# Names of the cache among a model's outputs and arguments: of attention, of state-space models and
# of RWKV.
CACHES = ("cache", "past_key_values", "cache_params", "state")


def _forward_names(model: nn.Module) -> set[str]:
    """Return the arguments of a model's forward; a wrapper hands its own on to the model in it."""
    for part in model.modules():
        names = {*inspect.signature(type(part).forward).parameters}
        if names & set(CACHES):
            return names
    return set()


def next_with_own_cache(
    model: Any, input_ids: Tensor, cache: Any, *, use_cache: bool = True
) -> tuple[Tensor, Any]:
    """Run one pass over ids [n, L] that follow those in ``cache``; None: the model makes one.

    Returns the logits [n, V] of the last column, in float32 (float64 for float64), and the cache,
    None without ``use_cache``.
    """
    names = _forward_names(model)
    arguments: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
    length = 0
    if cache is not None:
        name, kept, length = cache
        arguments[name] = kept
    # some models begin at 0 at every step; without a cache, a pass numbers its tokens as any other
    if use_cache and "position_ids" in names:
        columns = torch.arange(length, length + input_ids.shape[1], device=input_ids.device)
        arguments["position_ids"] = columns.expand_as(input_ids)
    output = output_of(model, input_ids=input_ids, use_cache=use_cache, **arguments)
    logits = output.logits[:, -1]
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if not use_cache:
        return logits, None
    for name in CACHES:
        if getattr(output, name, None) is not None and name in names:
            return logits, (name, getattr(output, name), length + input_ids.shape[1])
    raise ValueError("it returns no cache")


def keep_rows(cache: Any, rows: Tensor) -> None:
    """Keep sequences ``rows`` [n] alone in a cache that ``next_with_own_cache`` returned.

    Raises:
        ValueError: it has layers of a model's own.
    """
    kept = cache[1]
    kinds = {type(layer) for layer in kept.layers}
    # some of these keep states by sequence that they do not reorder, as DeepSeek V4's
    if others := [kind.__name__ for kind in kinds if kind.__module__ != Cache.__module__]:
        raise ValueError(f"its cache has layers of its own: {', '.join(sorted(others))}")
    kept.reorder_cache(rows)


def layer_output(states: Any, like: Any) -> Any:
    """Return ``states`` as a layer that returned ``like`` does: alone, or first in a tuple or list.

    What else such a layer returns, as weights of attention, is None: a body does not read it.
    """
    if not isinstance(like, (tuple, list)):
        return states
    return type(like)([states, *[None] * (len(like) - 1)])


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the states [B, L, D] that a body calls a layer with, where trunk states are read.

    A layer returns the next states as a tensor, not as a tuple.
    """
    return args[0] if args else kwargs["hidden_states"]


# Configurations

# How a layer attends: to everything before, or to a window of the last tokens.
FULL, SLIDING = "full_attention", "sliding_attention"


def layer_configs(config: Any) -> list[Any]:
    """Return the config of each layer; Gemma 4's alone have the sizes of its attention."""
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * config.num_hidden_layers


def head_size(config: Any) -> int:
    """Return the size of a head of attention; ``config`` is that of a layer."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_types(config: Any) -> list[str]:
    """Return how each layer attends, for its masks and its attention window.

    Raises:
        ValueError: a layer is neither ordinary attention nor one over a sliding window.
    """
    if "local" in (getattr(config, "attention_layers", None) or ()):
        raise ValueError(
            "policy_model: its local attention counts its window in columns of the cache, not in a "
            "row's own tokens"
        )
    types = getattr(config, "layer_types", None)
    if types is None:
        window = getattr(config, "sliding_window", None)
        types = [FULL if window is None else SLIDING] * config.num_hidden_layers
    if others := sorted(set(types) - {FULL, SLIDING}):
        raise ValueError(
            f"policy_model: its layers of type {', '.join(others)} have no keys and values per "
            "sequence, which the rollout's cache needs"
        )
    return list(types)


def windows(config: Any) -> list[int]:
    """Return the sizes of the windows that a model's attention may have."""
    found = [getattr(config, name, None) for name in ("sliding_window", "window_size")]
    chunk = getattr(config, "attention_chunk_size", None)
    return [size for size in (*found, chunk) if isinstance(size, int) and size > 0]


def mask_is_by_type(config: Any) -> bool:
    """Return whether a body takes a dict of masks, one per type of attention, in place of a mask.

    A mask of four dimensions, [n, 1, 1, columns], is used as it is.
    """
    return getattr(config, "layer_types", None) is not None and len(set(layer_types(config))) > 1


class ContextLimit(NamedTuple):
    """Max number of positions of a sequence, and the reason where it is not the model's own."""

    tokens: int
    why: str = ""


def context_limit_of(config: Any) -> ContextLimit | None:
    """Return the max number of positions at which a row does not depend on the rows beside it.

    Rotary embeddings of the type longrope take other frequencies for a whole batch once its longest
    row passes their original length, and keys in a cache keep the former ones. Those of the type
    dynamic do so beyond ``max_position_embeddings``.
    """
    limits = []
    if (positions := getattr(config, "max_position_embeddings", None) or 0) > 0:
        limits.append(ContextLimit(positions))
    if kept := getattr(config, "keep_window_size", None):
        why = "beyond it, which keys its attention keeps depends on padding"
        limits.append(ContextLimit(kept, why))
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for settings in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        kind = settings.get("rope_type", settings.get("type"))
        original = settings.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        if kind == "longrope" and original is not None:
            why = "its longrope rotary embeddings depend on the other rows of a batch beyond it"
            limits.append(ContextLimit(original, why))
    return min(limits, default=None)


def logit_scale(config: Any) -> float:
    """Return the factor of a model's logits, as Cohere's and Granite's have; 1 for others."""
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return float(getattr(config, "logit_scale", None) or 1.0) / float(divisor)


def softcap(config: Any) -> float | None:
    """Return the bound c of logits c tanh(x / c), as in Gemma 2; None for models without one."""
    return getattr(config, "final_logit_softcapping", None)


# Attention: on a GPU, an op of ours computes that of decoding steps (step_attention.py)

# Arguments of attention in some models, beside queries, keys, values, mask, scaling and window.
ATTENTION_EXTRAS = ("softcap", "s_aux", "sinks", "position_bias", "block_indices")


def attention_of(config: Any) -> str:
    """Return the name of a model's attention in AttentionInterface.

    The model looks it up at every call.
    """
    return getattr(config, "_attn_implementation", "sdpa")


@contextmanager
def attention_set_to(name: str, config: Any) -> Iterator[None]:
    """Temporarily set a model's attention.

    ``model.set_attn_implementation`` warns of wrapped models, and reads the model's source at every
    call.
    """
    before = attention_of(config)
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


# Other


def why_no_continuous_batching() -> str | None:
    """Return the reason why ``generate_batch`` cannot be used, or None if it can.

    Before transformers 5.9 its settings had no seed, and it drew from all tokens whatever ``top_k``
    and ``top_p`` were.
    """
    if hasattr(ContinuousBatchingConfig(), "seed"):
        return None
    return (
        "TransformersEngine needs transformers >= 5.9, whose generate_batch has a seed and top_k; "
        f"found {version('transformers')}; update it, or use the trainer's own engine"
    )


def in_order_of_requests(outputs: dict[str, Any]) -> list[Any]:
    """Return the outputs of ``generate_batch`` in the order of its inputs.

    It numbers the requests in that order, in names that end in _0, _1 ..., and returns them as they
    finish.
    """
    return sorted(outputs.values(), key=lambda output: int(output.request_id.split("_")[-1]))


def as_float_model(model: Any) -> None:
    """Let a model that was read from a GGUF be saved as an ordinary one.

    Its weights are dequantised, yet transformers treats it as quantised until this is called.
    """
    model.hf_quantizer = None
    del model.config.quantization_config


def why_no_add_adapter() -> str | None:
    """Return the reason why ``model.add_adapter`` refuses the installed peft, or None.

    transformers 5.24 came out before the peft that it asks for.
    """
    from transformers.integrations.peft import MIN_PEFT_VERSION

    try:
        found = version("peft")
    except PackageNotFoundError:
        return None
    if Version(found) >= Version(MIN_PEFT_VERSION):
        return None
    return (
        f"model.add_adapter of transformers {version('transformers')} needs peft >= "
        f"{MIN_PEFT_VERSION}, found {found}; update it, or use peft.get_peft_model(model, ...)"
    )
