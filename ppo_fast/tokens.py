"""Tokens: prompts and responses as ids, with everything that follows from their lengths.

Legend: B sequences, P prompt tokens, T response tokens, L = P + T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Prompts, padded on the left, and their responses, padded on the right.

    prompt_ids [B, P] and response_ids [B, T], int64 on the model's device. prompt_lengths and
    response_lengths [B], int64 on the CPU, so that no size is ever read back from a device. What
    stands at padded places is never looked at: masks come from lengths, not from a pad id.
    """

    prompt_ids: Tensor
    prompt_lengths: Tensor
    response_ids: Tensor
    response_lengths: Tensor

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    @property
    def device(self) -> torch.device:
        return self.prompt_ids.device

    @property
    def lengths(self) -> Tensor:
        """[B] real tokens of prompt and response together, int64 on the CPU."""
        return self.prompt_lengths + self.response_lengths

    @cached_property
    def input_ids(self) -> Tensor:
        """[B, P + T] int64."""
        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    @cached_property
    def prompt_mask(self) -> Tensor:
        """[B, P] bool, true at real prompt tokens."""
        width = self.prompt_ids.shape[1]
        return (torch.arange(width) >= width - self.prompt_lengths[:, None]).to(self.device)

    @cached_property
    def response_mask(self) -> Tensor:
        """[B, T] bool, true at real response tokens (EOS is one; nothing after it is)."""
        width = self.response_ids.shape[1]
        return (torch.arange(width) < self.response_lengths[:, None]).to(self.device)

    @cached_property
    def attention_mask(self) -> Tensor:
        """[B, P + T] int64."""
        return torch.cat([self.prompt_mask, self.response_mask], dim=1).long()

    @cached_property
    def position_ids(self) -> Tensor:
        """[B, P + T] int64: a real token's place among the real ones, 0 for padding before."""
        return position_ids(self.attention_mask)

    def window(self, rows: Tensor) -> slice:
        """The columns of [P + T] that ``rows`` need: the longest prompt and response among them."""
        width = self.prompt_ids.shape[1]
        first = width - int(self.prompt_lengths[rows].max())
        return slice(first, width + int(self.response_lengths[rows].max()))

    def select(self, rows: Tensor) -> Tokens:
        """Some rows (int64 on the CPU), without the columns that none of them needs."""
        columns, width = self.window(rows), self.prompt_ids.shape[1]
        index = rows.to(self.device)
        return Tokens(
            self.prompt_ids[index, columns.start :],
            self.prompt_lengths[rows],
            self.response_ids[index, : columns.stop - width],
            self.response_lengths[rows],
        )

    def repeated(self, times: int) -> Tokens:
        """All rows, then all of them again."""
        return Tokens(
            self.prompt_ids.repeat(times, 1),
            self.prompt_lengths.repeat(times),
            self.response_ids.repeat(times, 1),
            self.response_lengths.repeat(times),
        )

    def before_response(self, per_token: Tensor) -> Tensor:
        """[B, P + T, ...] -> [B, T, ...]: what stands before each response token."""
        return per_token[:, self.prompt_ids.shape[1] - 1 : -1]

    def sequences(self) -> list[Tensor]:
        """Each row's real tokens, [length] int64: the prompt's, then the response's."""
        width = self.prompt_ids.shape[1]
        pairs = zip(self.prompt_lengths.tolist(), self.response_lengths.tolist(), strict=True)
        return [self.input_ids[b, width - p : width + t] for b, (p, t) in enumerate(pairs)]

    def at_response(self, per_token: Sequence[Tensor]) -> Tensor:
        """One number for each real token of each row, as ``sequences`` has them -> [B, T]: those of
        the states before each response token, 0 beyond a response."""
        out = per_token[0].new_zeros(self.response_ids.shape)
        pairs = zip(self.prompt_lengths.tolist(), self.response_lengths.tolist(), strict=True)
        rows = [
            torch.nn.functional.pad(row[p - 1 : p - 1 + t], (0, out.shape[1] - t))
            for row, (p, t) in zip(per_token, pairs, strict=True)
        ]
        return torch.stack(rows) if rows else out


def position_ids(attention_mask: Tensor) -> Tensor:
    """[B, L] mask -> [B, L] positions: cumsum(mask) - 1, not below 0."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> Tensor:
    """Rows of ids -> [B, longest] int64, padded on the left."""
    width = max(map(len, rows))
    padded = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=device)


def pad_right(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> Tensor:
    """Rows of ids -> [B, longest] int64, padded on the right."""
    width = max(map(len, rows))
    padded = [list(row) + [pad_id] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=device)


def make_tokens(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
) -> Tokens:
    """Prompts and responses as lists of ids -> Tokens."""
    return Tokens(
        pad_left(prompts, pad_id, device),
        torch.tensor([len(p) for p in prompts]),
        pad_right(responses, pad_id, device),
        torch.tensor([len(r) for r in responses]),
    )


def batches_by_tokens(lengths: Tensor, budget: int) -> list[Tensor]:
    """Rows in batches of similar length: [B] lengths -> row indices, each batch of at most
    ``budget`` tokens with its padding (a longer row is a batch of its own)."""
    batches: list[list[int]] = []
    for row in torch.argsort(lengths, descending=True, stable=True).tolist():
        # rows come longest first, so a batch's first row is its width
        if batches and int(lengths[batches[-1][0]]) * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return [torch.tensor(batch) for batch in batches]
