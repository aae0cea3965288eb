"""Batches of rows of at most a number of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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


def in_batches(
    compute: Callable[[Tokens, Tensor | None], Tensor],
    tokens: Tokens,
    trunk_states: TrunkStates | None,
    max_tokens: int,
) -> Tensor:
    """Run ``compute`` on batches of at most ``max_tokens`` tokens, and join the results.

    Each result is [..., b, t]; joined they are [..., B, T] float32.
    """
    out = torch.empty(0, dtype=torch.float32, device="cpu")
    for rows in batches_by_tokens(tokens.lengths, max_tokens):
        part = compute(tokens.select(rows), select_trunk(trunk_states, tokens, rows)).float()
        if not out.numel():
            out = part.new_zeros(*part.shape[:-2], *tokens.response_ids.shape)
        out[..., rows.to(tokens.device), : part.shape[-1]] = part
    return out


def select_trunk(trunk_states: TrunkStates | None, tokens: Tokens, rows: Tensor) -> Tensor | None:
    """Return the trunk states for ``tokens.select(rows)``; None without a trunk."""
    return None if trunk_states is None else trunk_states.select(tokens, rows)
