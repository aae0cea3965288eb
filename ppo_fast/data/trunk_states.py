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

    Sequences with the same prompt have its states in common.

    states: [N, D].
    prompt_first, response_first: [B] int64 on the CPU, index of the first token of each prompt and
        of each response.
    whole: whether each row's last token has its state. Decoding does not need it, and leaves 0.
    """

    states: Tensor
    prompt_first: Tensor
    response_first: Tensor
    whole: bool

    @classmethod
    def pack(cls, padded: Tensor, tokens: Tokens, *, whole: bool) -> TrunkStates:
        """Pack padded states [B, L or more, D], in which each row's tokens come first."""
        rows, columns = tokens.packing.rows, tokens.packing.columns
        return cls.of(padded[rows.to(padded.device), columns.to(padded.device)], tokens, whole)

    @classmethod
    def of(cls, states: Tensor, tokens: Tokens, whole: bool) -> TrunkStates:
        """Keep states [N, D] of the packed ``tokens``."""
        return cls(states, tokens.packing.prompt_first, tokens.packing.response_first, whole)

    def __len__(self) -> int:
        return len(self.prompt_first)

    def to(self, dtype: torch.dtype) -> TrunkStates:
        return TrunkStates(
            self.states.to(dtype), self.prompt_first, self.response_first, self.whole
        )

    def select(self, rows: Tensor) -> TrunkStates:
        """Return the trunk states of ``rows`` (int64 on the CPU); all remain in memory."""
        return TrunkStates(
            self.states, self.prompt_first[rows], self.response_first[rows], self.whole
        )

    def padded(self, tokens: Tokens) -> Tensor:
        """Return the states [B, L, D] of ``tokens``, the sequences that these are.

        At padded positions they are some other token's.
        """
        return self._at(tokens, *tokens.padded_places)

    def packed(self, tokens: Tokens) -> Tensor:
        """Return the states [1, N, D] of ``tokens``, packed."""
        return self._at(tokens, tokens.packing.rows[None], tokens.packing.columns[None])

    def _at(self, tokens: Tokens, rows: Tensor, columns: Tensor) -> Tensor:
        return self.states[tokens.index_of(self, rows, columns).to(self.states.device)]


def join_trunk_states(parts: Sequence[TrunkStates | None]) -> TrunkStates | None:
    """Return the trunk states of all parts' rows; None where a part has none."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    counts = torch.tensor([len(part.states) for part in known], device="cpu")
    starts = counts.cumsum(0) - counts

    def shifted(name: str) -> Tensor:
        return torch.cat([getattr(p, name) + start for p, start in zip(known, starts, strict=True)])

    return TrunkStates(
        torch.cat([part.states for part in known]),
        shifted("prompt_first"),
        shifted("response_first"),
        all(part.whole for part in known),
    )
