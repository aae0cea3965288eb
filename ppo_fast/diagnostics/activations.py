"""Count what autograd keeps of a pass, by running it on fake tensors."""

from __future__ import annotations

from typing import Any

import torch

from ppo_fast.config import PPOConfig
from ppo_fast.models.parts import body_of
from ppo_fast.models.patching import replaced_forwards
from ppo_fast.models.precision import computing_in
from ppo_fast.models.setup import enable_gradient_checkpointing
from ppo_fast.models.trunk import Split


def kept_activations(policy: Any, k: int | None, rows: int, length: int, config: PPOConfig) -> int:
    """Return the bytes that autograd keeps of a microbatch in the policy's pass.

    The value function's pass takes as much, but not at the same time. With gradient checkpointing,
    they are what the forward pass keeps, and one layer's activations, computed again in the
    backward pass.
    """
    layers: int = policy.config.get_text_config().num_hidden_layers
    whole = saved_bytes(policy, k, rows, length, config.torch_dtype)
    if not config.gradient_checkpointing:
        return whole
    enable_gradient_checkpointing(policy, "policy_model")
    policy.train()
    return saved_bytes(policy, k, rows, length, config.torch_dtype) + whole // (k or layers)


def saved_bytes(
    policy: Any, k: int | None, rows: int, length: int, dtype: torch.dtype | None
) -> int:
    weights = {p.untyped_storage()._cdata for p in policy.parameters()}
    kept: dict[int, int] = {}
    alive = []  # else a new storage might get the address of a freed one

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    body = body_of(policy)
    with (
        computing_in(dtype, torch.device("cpu")),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
    ):
        input_ids = torch.zeros(rows, length, dtype=torch.int64)
        if k is None:
            body(input_ids=input_ids, use_cache=False)
        else:
            hidden = policy.config.get_text_config().hidden_size
            trunk_states = torch.zeros(rows, length, hidden, dtype=next(body.parameters()).dtype)
            lower = Split(body, k).lower
            with replaced_forwards([(layer, lambda *_, **__: trunk_states) for layer in lower]):
                body(input_ids=input_ids, use_cache=False)
    return sum(kept.values())
