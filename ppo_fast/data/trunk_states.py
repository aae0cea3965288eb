"""Activations of the frozen trunk, kept from the rollout to the last epoch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppo_fast.data.tokens import Tokens


@dataclass(frozen=True)
class TrunkStates:
    """What enters the first layer of the top: of B sequences' tokens, without padding.

    states: [N, D], row after row.
    first: [B] int64 on the CPU, where each row starts.
    whole: whether each row's last token is among them; decoding has no need of it, and has 0 there.
    """

    states: Tensor
    first: Tensor
    whole: bool

    @classmethod
    def pack(cls, padded: Tensor, tokens: Tokens, *, whole: bool) -> TrunkStates:
        """From [B, L or more, D], each row's tokens first."""
        lengths = tokens.lengths
        first = lengths.cumsum(0) - lengths
        row = torch.repeat_interleave(torch.arange(len(lengths), device="cpu"), lengths)
        column = torch.arange(len(row), device="cpu") - first[row]
        return cls(padded[row.to(padded.device), column.to(padded.device)], first, whole)

    def to(self, dtype: torch.dtype) -> TrunkStates:
        return TrunkStates(self.states.to(dtype), self.first, self.whole)

    def select(self, tokens: Tokens, rows: Tensor) -> Tensor:
        """Of ``rows`` (int64 on the CPU), [b, l, D] beside ``tokens.select(rows).input_ids``; at
        padded places some other token's."""
        lengths = tokens.lengths[rows]
        places = torch.minimum(torch.arange(int(lengths.max()), device="cpu"), lengths[:, None] - 1)
        return self.states[(self.first[rows][:, None] + places).to(self.states.device)]
