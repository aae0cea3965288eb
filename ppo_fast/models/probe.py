"""One pass of a model over a few tokens, on which its ways to compute are compared."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppo_fast.data.tokens import Tokens
from ppo_fast.models.parts import num_embeddings
from ppo_fast.models.patching import uncompiled
from ppo_fast.models.precision import HALF, autocast_dtype
from ppo_fast.models.trunk import run


class Probed(NamedTuple):
    """Result of ``probe``.

    tokens: those of ``probe_tokens``.
    logits: the model's logits for them.
    autocast: dtype of the autocast that the model's own forward enters, as that of a model which
        accelerate has prepared does; None: it enters none.
    """

    tokens: Tokens
    logits: Tensor
    autocast: torch.dtype | None


def probe_tokens(model: Any) -> Tokens:
    """Return a few tokens of the model's vocabulary, [3, 5].

    The second row is padded; the third differs from the first in its last token alone.
    """
    device = next(model.parameters()).device
    ids = torch.arange(10, device=device).reshape(2, 5) * 7 + 1
    ids = torch.cat([ids, ids[:1]])
    ids[2, 4] += 1
    ids %= num_embeddings(model)
    lengths = torch.tensor([[3, 2, 3], [2, 2, 2]], device="cpu")
    return Tokens(ids[:, :3], lengths[0], ids[:, 3:], lengths[1])


@torch.no_grad()
def probe(model: nn.Module) -> Probed:
    """Run a model over a few tokens.

    Raises:
        ValueError: the model cannot be called with ``input_ids`` and ``use_cache`` alone, or gives
            logits for tokens that it has no embeddings of.
        TypeError: it is not causal: a token's logits change with later tokens.
    """
    tokens = probe_tokens(model)
    device = tokens.device.type
    outside = autocast_dtype(device)
    inside: set[torch.dtype | None] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_: inside.add(autocast_dtype(device)))
        for module in model.modules()
        if not list(module.children())
    ]
    try:
        with uncompiled(model):
            logits = run(model, tokens).logits
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as cause:
        how = (
            "with input_ids and use_cache alone" if outside is None else f"in autocast to {outside}"
        )
        raise ValueError(
            f"policy_model: {type(model).__name__} cannot be called {how} "
            f"({type(cause).__name__}: {cause})"
        ) from cause
    finally:
        for handle in handles:
            handle.remove()
    half = logits.dtype in HALF or bool(inside - {None}) or next(model.parameters()).dtype in HALF
    _check_logits(model, logits, half=half)
    return Probed(tokens, logits, next(iter(inside - {None, outside}), None))


def _check_logits(model: nn.Module, logits: Tensor, *, half: bool) -> None:
    kind, rows = type(model).__name__, num_embeddings(model)
    if logits.shape[-1] > rows:
        raise ValueError(
            f"policy_model: {kind} gives {logits.shape[-1]} logits but has {rows} embeddings, so "
            "that it could not read a token that it samples; use "
            "policy_model.resize_token_embeddings"
        )
    first, last = logits[0, :4].float(), logits[2, :4].float()
    difference = relative_difference(last, first)
    if difference > (3e-3 if half else 1e-5):
        raise TypeError(
            f"policy_model: {kind} is not causal: a token's logits change with later tokens (by "
            f"{difference:.1e}); use a decoder, or load this model with is_decoder=True"
        )


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest |difference| relative to the largest |expected|; 0 where all are 0."""
    difference, size = (found - expected).abs().max(), expected.abs().max()
    return float(difference / size) if size > 0 else float(difference)
