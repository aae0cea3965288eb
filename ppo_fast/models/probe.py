"""One pass of a model over a few tokens, on which its ways to compute are compared."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppo_fast.data.tokens import Tokens
from ppo_fast.models.patching import uncompiled
from ppo_fast.models.trunk import run


class Probed(NamedTuple):
    """Result of ``probe``.

    tokens: the tokens, one row padded.
    logits: the model's logits for them.
    autocast: dtype of the autocast that the model's own forward enters, as that of a model which
        accelerate has prepared does; None: it enters none.
    """

    tokens: Tokens
    logits: Tensor
    autocast: torch.dtype | None


def probe_tokens(model: Any) -> Tokens:
    """Return a few tokens of the model's vocabulary, one row padded."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(embedding, "num_embeddings", model.config.get_text_config().vocab_size)
    device = next(model.parameters()).device
    ids = (torch.arange(10, device=device).reshape(2, 5) * 7 + 1) % rows
    lengths = torch.tensor([[3, 2], [2, 2]], device="cpu")
    return Tokens(ids[:, :3], lengths[0], ids[:, 3:], lengths[1])


@torch.no_grad()
def probe(model: nn.Module) -> Probed:
    """Run a model over a few tokens.

    Raises:
        ValueError: the model cannot be called with ``input_ids`` and ``use_cache`` alone.
    """
    tokens = probe_tokens(model)
    device = tokens.device.type
    outside = _autocast(device)
    inside: set[torch.dtype | None] = set()
    leaves = [module for module in model.modules() if not list(module.children())]
    handles = [
        leaf.register_forward_pre_hook(lambda *_: inside.add(_autocast(device))) for leaf in leaves
    ]
    try:
        with uncompiled(model):
            logits = run(model, tokens).logits
    except TypeError as cause:
        raise ValueError(
            f"policy_model: {type(model).__name__} cannot be called with input_ids and use_cache "
            f"alone ({cause})"
        ) from cause
    finally:
        for handle in handles:
            handle.remove()
    return Probed(tokens, logits, next(iter(inside - {None, outside}), None))


def _autocast(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
