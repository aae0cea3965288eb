"""Checks of the models and the tokenizer that a trainer is given, before any model runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ppo_fast.data.prompts import Limit
from ppo_fast.models.parts import num_embeddings
from ppo_fast.models.quantized import quantized_layers
from ppo_fast.models.transformers_internals import context_limit_of


def check_policy(policy_model: Any, name: str = "policy_model") -> None:
    """Check that a policy, or its reference, is a transformers causal language model.

    Raises:
        TypeError: it is something else, a model whose tokens see later ones by design, or one with
            an adapter that adds virtual tokens.
    """
    if hasattr(policy_model, "pretrained_model") and hasattr(policy_model, "v_head"):
        raise TypeError(
            f"{name}: got a {type(policy_model).__name__}, expected the causal language model in "
            "it; pass model.pretrained_model, and config=PPOConfig(critic='head') for a value head"
        )
    if not isinstance(policy_model, nn.Module) or not hasattr(policy_model, "config"):
        raise TypeError(
            f"{name}: got {type(policy_model).__name__}, expected a transformers causal "
            "language model, as AutoModelForCausalLM.from_pretrained(...) gives"
        )
    adapter: Any = getattr(policy_model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise TypeError(
            f"{name}: its adapter is a {type(adapter).__name__}, which puts virtual tokens "
            "before every prompt; use an adapter that changes layers, as LoRA does"
        )
    if getattr(adapter, "alora_invocation_tokens", None):
        raise TypeError(
            f"{name}: its adapter is an activated LoRA (aLoRA), which changes only tokens after "
            "its invocation sequence; use an ordinary LoraConfig"
        )
    head = getattr(policy_model, "get_output_embeddings", lambda: None)()
    if head is None or getattr(policy_model.config, "is_encoder_decoder", False):
        raise TypeError(
            f"{name}: {type(policy_model).__name__} is not a causal language model; load "
            "it with AutoModelForCausalLM.from_pretrained(...)"
        )
    if "lsh" in (getattr(policy_model.config, "attn_layers", None) or ()):  # Reformer's
        raise TypeError(
            f"{name}: {type(policy_model).__name__} sorts tokens into buckets, by which a token's "
            "logits change with later tokens; use a model of another family"
        )


def check_tokenizer(tokenizer: Any) -> None:
    """Check that the tokenizer is one, and has a pad token.

    Raises:
        TypeError: it is no tokenizer.
        ValueError: it has no pad token.
    """
    if not hasattr(tokenizer, "get_vocab"):
        raise TypeError(
            f"tokenizer: got {type(tokenizer).__name__}, expected a transformers tokenizer, as "
            "AutoTokenizer.from_pretrained(...) gives"
        )
    if getattr(tokenizer, "pad_token_id", None) is None:
        raise ValueError(
            "tokenizer: has no pad token; set one, for example "
            "tokenizer.pad_token = tokenizer.eos_token"
        )


def check_vocabulary(model: Any, name: str, tokenizer: Any) -> None:
    """Check that a model which reads the policy's tokens has an embedding for each of them.

    Raises:
        ValueError: it has fewer.
    """
    if not isinstance(model, nn.Module):
        return
    largest = max(tokenizer.get_vocab().values(), default=0)
    parts: list[Any] = [model, getattr(model, "base_model", None)]
    reading = [part for part in parts if hasattr(part, "get_input_embeddings")]
    if not reading:
        return
    if reading[0].get_input_embeddings() is None or largest < num_embeddings(reading[0]):
        return
    rows = num_embeddings(reading[0])
    mend = {
        "policy_model": "use the model's own tokenizer, or "
        "policy_model.resize_token_embeddings(len(tokenizer))",
        "reward_model": "if it has a tokenizer of its own, pass ClassifierReward(reward_model, "
        "its_tokenizer)",
    }
    raise ValueError(
        f"tokenizer: its largest id is {largest}, but {name} has {rows} embeddings; "
        f"{mend.get(name, 'use a model of the same vocabulary')}"
    )


def resolve_device(device: torch.device | str | None, policy_model: nn.Module) -> torch.device:
    """Return the device asked for; None: that of the policy; "auto": a GPU if there is one.

    Raises:
        ValueError: torch knows no such device, or has none of that kind.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(next(policy_model.parameters()).device if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device: got {device!r}, expected 'cpu', 'cuda', 'cuda:1', ... or 'auto'"
        ) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device: got {str(found)!r}, but torch {torch.__version__} finds no CUDA GPU; use "
            "device='cpu', or install a CUDA build of torch"
        )
    return found


def to_device(model: Any, name: str, device: torch.device) -> None:
    """Move a module from the CPU to ``device``; leave one that is there already.

    Raises:
        ValueError: its weights are on several devices, or on one that is neither the CPU nor
            ``device``.
    """
    if not isinstance(model, nn.Module):
        return
    found = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    if len(found) > 1:
        raise ValueError(
            f"{name}: its weights lie on several devices {sorted(map(str, found))}, expected one; "
            "load it without device_map"
        )
    where = next(iter(found), device)
    if quantized_layers(model):
        if where.type != device.type:
            raise ValueError(
                f"{name}: is quantised and lies on {where}, but device={device}; load it there: "
                f"from_pretrained(..., device_map={{'': {str(device)!r}}})"
            )
        return
    if where.type not in ("cpu", device.type) or (
        where.type == device.type and None not in (where.index, device.index) and where != device
    ):
        raise ValueError(
            f"{name}: lies on {where}, but device={device}; the models of a trainer share one "
            f"device: move it with .to({str(device)!r})"
        )
    model.to(device)


def context_limit(models: Mapping[str, Any]) -> Limit | None:
    """Return the least number of positions that the models, by name, can take; None: no limit."""
    limits = []
    for name, model in models.items():
        config: Any = getattr(model, "config", None)
        if config is None:
            config = getattr(getattr(model, "base_model", None), "config", None)
        found = None
        if hasattr(config, "get_text_config"):
            found = context_limit_of(config.get_text_config())
        if found is not None:
            whose = f"{name}'s context of {found.tokens}"
            limits.append(Limit(found.tokens, f"{whose} ({found.why})" if found.why else whose))
    return min(limits, key=lambda limit: limit.tokens, default=None)


def check_kv_cache_dtype(
    dtype: torch.dtype | None, model: nn.Module, compute_dtype: torch.dtype | None
) -> None:
    """Check that decoding with ``model`` can store keys and values in ``dtype``; None: as computed.

    Raises:
        ValueError: the model is in float64, or computes in float32 on a GPU.
    """
    if dtype is None:
        return
    weight = next(model.parameters())
    got = f"kv_cache_dtype: got {dtype_name(dtype)!r} for {type(model).__name__}"
    if weight.dtype == torch.float64:
        raise ValueError(f"{got} in float64, expected None; or convert the model to float32")
    computed = compute_dtype or weight.dtype
    if weight.device.type != "cpu" and computed == torch.float32:
        raise ValueError(
            f"{got}, which computes in float32 on {weight.device}; the cache there has the dtype "
            "that steps compute in: use None, or compute_dtype='bfloat16'"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as settings have it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
