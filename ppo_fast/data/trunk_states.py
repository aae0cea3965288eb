"""Trunk states: activations of the frozen trunk, kept from the rollout to the last epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppo_fast.data.tokens import Tokens


@dataclass(frozen=True)
class TrunkStates:
    """Inputs of the first top layer for the tokens of B sequences, without padding.

    states: [N, D], row after row.
    first: [B] int64 on the CPU, index of each row's first token.
    whole: whether each row's last token has its state. Decoding does not need it, and leaves 0.
    """

    states: Tensor
    first: Tensor
    whole: bool

    @classmethod
    def pack(cls, padded: Tensor, tokens: Tokens, *, whole: bool) -> TrunkStates:
        """Pack padded states [B, L or more, D], in which each row's tokens come first."""
        lengths = tokens.lengths
        first = lengths.cumsum(0) - lengths
        row = torch.repeat_interleave(torch.arange(len(lengths), device="cpu"), lengths)
        column = torch.arange(len(row), device="cpu") - first[row]
        return cls(padded[row.to(padded.device), column.to(padded.device)], first, whole)

    def to(self, dtype: torch.dtype) -> TrunkStates:
        return TrunkStates(self.states.to(dtype), self.first, self.whole)

    def rows(self, rows: Tensor) -> TrunkStates:
        """Return the trunk states of ``rows`` (int64 on the CPU); all remain in memory."""
        return TrunkStates(self.states, self.first[rows], self.whole)

    def select(self, tokens: Tokens, rows: Tensor) -> Tensor:
        """Return the states [b, l, D] of ``rows`` (int64 on the CPU), padded on the right.

        They match ``tokens.select(rows).input_ids``; at padded positions they are some other
        token's.
        """
        lengths = tokens.lengths[rows]
        positions = torch.minimum(
            torch.arange(int(lengths.max()), device="cpu"), lengths[:, None] - 1
        )
        return self.states[(self.first[rows][:, None] + positions).to(self.states.device)]


def join_trunk_states(parts: Sequence[TrunkStates | None]) -> TrunkStates | None:
    """Return the trunk states of all parts' rows; None where a part has none."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    counts = torch.tensor([len(part.states) for part in known], device="cpu")
    starts = counts.cumsum(0) - counts
    first = [part.first + start for part, start in zip(known, starts, strict=True)]
    whole = all(part.whole for part in known)
    return TrunkStates(torch.cat([part.states for part in known]), torch.cat(first), whole)
