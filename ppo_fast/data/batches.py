"""Batches of rows of at most a number of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ppo_fast.data.packing import packed_batches
from ppo_fast.data.tokens import Tokens
from ppo_fast.data.trunk_states import TrunkStates


def batches_by_tokens(lengths: Tensor, max_tokens: int) -> list[Tensor]:
    """Group rows of similar length into batches: [B] lengths -> row indices of each batch.

    A batch has at most ``max_tokens`` tokens with its padding; a longer row is a batch of its own.
    """
    batches: list[list[int]] = []
    for row in torch.argsort(lengths, descending=True, stable=True).tolist():
        # rows come longest first, so a batch's first row is its width
        if batches and int(lengths[batches[-1][0]]) * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return [torch.tensor(batch, device="cpu") for batch in batches]


def batches_of(tokens: Tokens, max_tokens: int, *, packed: bool) -> list[Tensor]:
    """Group rows into batches of at most ``max_tokens`` tokens, as packed or with padding."""
    return (
        packed_batches(tokens, max_tokens)
        if packed
        else batches_by_tokens(tokens.lengths, max_tokens)
    )


def in_batches(
    compute: Callable[[Tokens, TrunkStates | None], Tensor],
    tokens: Tokens,
    trunk_states: TrunkStates | None,
    max_tokens: int,
    *,
    packed: bool = False,
) -> Tensor:
    """Run ``compute`` on batches of at most ``max_tokens`` tokens, and join the results.

    Each result is [..., b, t]; joined they are [..., B, T] float32. ``packed`` says that the passes
    need no padding.
    """
    out = torch.empty(0, dtype=torch.float32, device="cpu")
    for rows in batches_of(tokens, max_tokens, packed=packed):
        of_rows = None if trunk_states is None else trunk_states.select(rows)
        part = compute(tokens.select(rows), of_rows).float()
        if not out.numel():
            out = part.new_zeros(*part.shape[:-2], *tokens.response_ids.shape)
        out[..., rows.to(tokens.device), : part.shape[-1]] = part
    return out
