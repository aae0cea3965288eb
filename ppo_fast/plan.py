"""What training will take, before anything is allocated: from a transformers config alone.

The model is made of fake tensors, which have shapes and no memory, and one pass through it counts
what autograd keeps: for 70B parameters that takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from ppo_fast.config import PPOConfig
from ppo_fast.forwards import replaced_forwards
from ppo_fast.models import ValueModel, enable_gradient_checkpointing
from ppo_fast.ops.linear_logprobs.api import LOGITS_BUDGET_BYTES
from ppo_fast.rollout.slots import layer_types
from ppo_fast.trunk import Split, freeze_trunk

FLOAT = 4
TOP = 4
"""Layers of the plans with a trunk, where the config names no number."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. Weights, their gradients and AdamW's moments are float32; keys, values and activations
    are of the dtype that the model computes in, float32.

    policy, reference, value_function: weights; the reference's and those of a top without what they
        share with the policy.
    gradients, optimizer: of all trained weights.
    trunk: its activations for a batch.
    cache: keys and values of a rollout.
    activations: what autograd keeps of one microbatch, without logits.
    logits: tiles of the LM head that are kept for the backward pass.
    """

    policy: int
    reference: int
    value_function: int
    gradients: int
    optimizer: int
    trunk: int
    cache: int
    activations: int
    logits: int

    @property
    def peak(self) -> int:
        """The most at one time: gradients and activations come when the cache is gone."""
        held = self.policy + self.reference + self.value_function + self.optimizer + self.trunk
        return held + max(self.cache, self.gradients + self.activations + self.logits)


def plan_memory(
    model_config: Any,
    config: PPOConfig,
    *,
    batch_size: int,
    prompt_length: int,
    value_model: nn.Module | None = None,
) -> MemoryPlan:
    """The plan for a policy of ``model_config``, a transformers config.

    Args:
        model_config: of a causal LM whose head is fused (linear_logprobs).
        config: how it is trained.
        batch_size: prompts a step.
        prompt_length: tokens of each, at most.
        value_model: for ``critic="model"``; None: a ``ValueModel`` over a copy of the policy.

    Raises:
        ValueError: the model cannot be split or its layers not be cached.
    """
    text: Any = model_config.get_text_config()
    length, k = prompt_length + config.max_length, config.num_layers_unfrozen
    rows = min(batch_size, max(1, config.microbatch_tokens // length))
    with FakeTensorMode():
        policy = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
        if k is not None:
            freeze_trunk(policy, k)
        trained = _count(policy, _trained)
        value, value_trained = _value_function(policy, config, text.hidden_size, value_model)
        activations = _kept(policy, k, rows, length, config)
    trunk_bytes = FLOAT if config.trunk_dtype is None else 2
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    slots = min(config.rollout_slots or batch_size, batch_size)
    per_token = 2 * len(layer_types(text)) * kv_heads * head_size
    return MemoryPlan(
        policy=FLOAT * _count(policy),
        reference=FLOAT * trained,
        value_function=FLOAT * value,
        gradients=FLOAT * (trained + value_trained),
        optimizer=2 * FLOAT * (trained + value_trained),
        trunk=0 if k is None else trunk_bytes * batch_size * length * text.hidden_size,
        cache=FLOAT * per_token * slots * length,
        activations=activations,
        logits=min(FLOAT * rows * config.max_length * text.vocab_size, LOGITS_BUDGET_BYTES),
    )


def plans(
    model_config: Any, config: PPOConfig, *, batch_size: int, prompt_length: int
) -> dict[str, MemoryPlan]:
    """Ways to train a policy, by what they are."""
    layers = model_config.get_text_config().num_hidden_layers
    k = min(config.num_layers_unfrozen or TOP, layers - 1)
    ways = {
        "all layers, a value model": {"critic": "model", "num_layers_unfrozen": None},
        "all layers, a value head": {"critic": "head", "num_layers_unfrozen": None},
    }
    if k > 0:
        ways |= {
            f"{k} top layers, values from a top": {"critic": "top", "num_layers_unfrozen": k},
            f"{k} top layers, a value head": {"critic": "head", "num_layers_unfrozen": k},
        }
    return {
        name: plan_memory(
            model_config,
            replace(config, **way),  # type: ignore[arg-type]
            batch_size=batch_size,
            prompt_length=prompt_length,
        )
        for name, way in ways.items()
    }


def show_plans(console: Console, found: dict[str, MemoryPlan], memory_gb: float | None) -> None:
    """A table, a column a plan, in GB (10^9 bytes)."""
    table = Table(title="memory of a run in GB, computed")
    table.add_column("", no_wrap=True)
    for name in found:
        table.add_column(name, justify="right")
    parts = [name for name in MemoryPlan.__dataclass_fields__ if name != "peak"]
    for part in (*parts, "peak"):
        sizes = [f"{getattr(plan, part) / 1e9:.2f}" for plan in found.values()]
        table.add_row(part.replace("_", " "), *sizes, end_section=part == parts[-1])
    if memory_gb is not None:
        fits = ["yes" if plan.peak <= 1e9 * memory_gb else "no" for plan in found.values()]
        table.add_row(f"fits {memory_gb:g} GB", *fits)
    console.print(table)


def _count(module: nn.Module, which: Callable[[nn.Parameter], bool] = lambda _: True) -> int:
    return sum(p.numel() for p in module.parameters() if which(p))


def _trained(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


def _value_function(
    policy: Any, config: PPOConfig, hidden_size: int, value_model: nn.Module | None
) -> tuple[int, int]:
    """Weights of its own, and how many of them are trained."""
    critic = config.critic or ("baseline" if value_model is None else "model")
    if critic == "baseline":
        return 0, 0
    if critic == "model" and value_model is not None:
        return _count(value_model), _count(value_model, _trained)
    if critic == "model":
        head = _count(ValueModel(policy, hidden_size).value_head)
        return _count(policy) + head, _count(policy.base_model) + head
    count = hidden_size + 1
    count += _count(policy.base_model, _trained) if critic == "top" else 0
    return count, count


def _kept(policy: Any, k: int | None, rows: int, length: int, config: PPOConfig) -> int:
    """Bytes that autograd keeps of a microbatch: of the policy's pass, or of the value function's,
    which is as large, but not of both at once. Without checkpointing's second computation of a
    layer's insides."""
    layers: int = policy.config.get_text_config().num_hidden_layers
    whole = _saved(policy, k, rows, length)
    if not config.gradient_checkpointing:
        return whole
    enable_gradient_checkpointing(policy, "policy_model")
    policy.train()
    return _saved(policy, k, rows, length) + whole // (k or layers)


def _saved(policy: Any, k: int | None, rows: int, length: int) -> int:
    weights = {p.untyped_storage()._cdata for p in policy.parameters()}
    kept: dict[int, int] = {}
    alive = []  # else another tensor might get a storage's place

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    body = policy.base_model
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        if k is None:
            body(input_ids=torch.zeros(rows, length, dtype=torch.int64), use_cache=False)
        else:
            hidden = policy.config.get_text_config().hidden_size
            trunk = torch.zeros(rows, length, hidden)
            lower = Split(body, k).lower
            with replaced_forwards([(layer, lambda *_, **__: trunk) for layer in lower]):
                body(inputs_embeds=trunk, use_cache=False)
    return sum(kept.values())
