"""Checks of what users hand in, made before any model runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn


def check_policy(policy_model: Any) -> None:
    """A transformers causal language model.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(policy_model, nn.Module) or not hasattr(policy_model, "config"):
        raise TypeError(
            f"policy_model: got {type(policy_model).__name__}, expected a transformers causal "
            "language model, as AutoModelForCausalLM.from_pretrained(...) gives"
        )
    adapter: Any = getattr(policy_model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise TypeError(
            f"policy_model: its adapter is a {type(adapter).__name__}, whose "
            "virtual tokens stand before every prompt; use one that changes layers, as LoRA does"
        )
    head = getattr(policy_model, "get_output_embeddings", lambda: None)()
    if head is None or getattr(policy_model.config, "is_encoder_decoder", False):
        raise TypeError(
            f"policy_model: {type(policy_model).__name__} is no causal language model; load it "
            "with AutoModelForCausalLM.from_pretrained(...)"
        )


def check_tokenizer(tokenizer: Any, policy_model: nn.Module) -> None:
    """A tokenizer with a pad token, all of whose ids the policy has.

    Raises:
        ValueError: it has no pad token, or ids beyond the policy's vocabulary.
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
    largest = max(tokenizer.get_vocab().values(), default=0)
    rows = policy_model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if largest >= rows:
        raise ValueError(
            f"tokenizer: its largest id is {largest}, but policy_model has {rows} embeddings; use "
            "the model's own tokenizer, or policy_model.resize_token_embeddings(len(tokenizer))"
        )


def place(model: Any, name: str, device: torch.device) -> None:
    """Move a module that lies on the CPU to ``device``.

    Raises:
        ValueError: it lies on several devices, or on one that is neither the CPU nor ``device``.
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
    if where.type not in ("cpu", device.type) or (
        where.type == device.type and None not in (where.index, device.index) and where != device
    ):
        raise ValueError(
            f"{name}: lies on {where}, but device={device}; the models of a trainer share one "
            f"device: move it with .to({str(device)!r})"
        )
    model.to(device)


def check_counts(**counts: Any) -> None:
    """Whole numbers of at least 1.

    Raises:
        ValueError: one is not.
    """
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a whole number of at least 1")


def check_prompts(prompts: Any) -> list[str]:
    """A list of strings, not empty.

    Raises:
        TypeError: ``prompts`` is one string or no list, or holds something that is not a string.
        ValueError: there are none.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts: got one string, expected a list of strings; pass [prompt]")
    if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping):
        raise TypeError(f"prompts: got {type(prompts).__name__}, expected a list of strings")
    prompts = list(prompts)
    if not prompts:
        raise ValueError("prompts: got an empty list, expected at least one prompt")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts[{i}]: got {type(prompt).__name__}, expected a string")
    return prompts


def context_limit(model: nn.Module) -> int | None:
    """The most positions that the model's config allows; None when it names no limit."""
    config = getattr(model, "config", None)
    return None if config is None else getattr(
        config.get_text_config(), "max_position_embeddings", None
    )  # fmt: skip


def check_prompt_ids(
    prompts: Sequence[str],
    prompt_ids: Sequence[Sequence[int]],
    max_length: int,
    limit: int | None,
) -> None:
    """No prompt is empty, and each leaves room for a response of ``max_length`` tokens.

    Raises:
        ValueError: one does not (it is named, with its length and the limit).
    """
    for i, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True)):
        if not ids:
            raise ValueError(
                f"prompts[{i}]: {prompt!r} is empty after tokenisation; remove it, or give the "
                "model something to start from"
            )
        if limit is not None and len(ids) + max_length > limit:
            short = prompt if len(prompt) <= 60 else prompt[:57] + "..."
            raise ValueError(
                f"prompts[{i}]: {short!r} has {len(ids)} tokens; with max_length={max_length} "
                f"that exceeds the model's context of {limit}; shorten the prompt or lower "
                f"max_length to {max(limit - len(ids), 0)}"
            )
