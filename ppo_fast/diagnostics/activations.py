"""Count what autograd keeps of a pass, by running it on fake tensors."""

from __future__ import annotations

from typing import Any

import torch

from ppo_fast.config import PPOConfig
from ppo_fast.data.tokens import Tokens, make_tokens
from ppo_fast.models.packed_attention import PackedPass
from ppo_fast.models.parts import body_of
from ppo_fast.models.patching import replaced_forwards
from ppo_fast.models.precision import computing_in
from ppo_fast.models.setup import enable_gradient_checkpointing
from ppo_fast.models.trunk import Split, run


def kept_activations(
    policy: Any, k: int | None, padded: Tokens, packed: Tokens | None, config: PPOConfig
) -> int:
    """Return the bytes that autograd keeps of a microbatch in the policy's pass.

    The microbatch is ``packed``, or ``padded`` where that is None or the model's attention cannot
    be told of it. The value function's pass takes as much, but not at the same time. With gradient
    checkpointing, they are what the forward pass keeps, and one layer's activations, computed again
    in the backward pass.
    """
    layers: int = policy.config.get_text_config().num_hidden_layers
    whole, packs = saved_bytes(policy, k, padded, packed, config.torch_dtype)
    if not config.gradient_checkpointing:
        return whole
    enable_gradient_checkpointing(policy, "policy_model")
    policy.train()
    kept, _ = saved_bytes(policy, k, padded, packed if packs else None, config.torch_dtype)
    return kept + whole // (k or layers)


def saved_bytes(
    policy: Any, k: int | None, padded: Tokens, packed: Tokens | None, dtype: torch.dtype | None
) -> tuple[int, bool]:
    """Return the bytes that autograd keeps, and whether the pass was packed."""
    if packed is not None:
        try:
            return _saved_bytes(policy, k, packed, dtype, packed=True), True
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
            pass  # as at construction, where such a model is found to need padding
    return _saved_bytes(policy, k, padded, dtype, packed=False), False


def _saved_bytes(
    policy: Any, k: int | None, tokens: Tokens, dtype: torch.dtype | None, *, packed: bool
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
    text_config = policy.config.get_text_config()
    shape = (1, len(tokens.packing)) if packed else tuple(tokens.input_ids.shape)
    replaced: list[Any] = []
    if k is not None:
        trunk_states = torch.zeros(
            *shape, text_config.hidden_size, dtype=next(body.parameters()).dtype
        )
        lower = Split(body, k).lower
        replaced = [(layer, lambda *_, **__: trunk_states) for layer in lower]
    with (
        computing_in(dtype, torch.device("cpu")),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        replaced_forwards(replaced),
    ):
        run(body, tokens, packed=PackedPass(tokens, text_config) if packed else None)
    return sum(kept.values())


def microbatches(
    config: PPOConfig, sequences: int, prompt_length: int
) -> tuple[Tokens, Tokens | None]:
    """Return the tokens of the largest microbatch, as a padded pass and as a packed one has them.

    A packed one has each prompt once for its samples. All sequences have the longest prompt and the
    longest response. None: passes are not to be packed.
    """
    samples = config.samples_per_prompt

    def tokens_of(count: int) -> Tokens:
        prompts = [[row // samples] * prompt_length for row in range(count)]
        found = make_tokens(
            prompts, [[0] * config.max_length] * count, 0, torch.device("cpu")
        ).without_last
        _ = found.input_ids, found.packed_ids, found.packing  # they are read among fake tensors
        return found

    length = prompt_length + config.max_length
    padded = tokens_of(min(sequences, max(1, config.microbatch_tokens // length)))
    if not config.padding_free:
        return padded, None
    of_response = config.max_length + prompt_length / samples
    count = min(sequences, max(1, int(config.microbatch_tokens / of_response)))
    return padded, tokens_of(count)
