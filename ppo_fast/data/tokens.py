"""Tokens: prompts and responses as ids, with everything that follows from their lengths.

Legend: B sequences, P prompt tokens, T response tokens, L tokens of the longest row (a prompt and
its response, so that L <= P + T).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ppo_fast.data.packing import Packing, Places, pack


@dataclass(frozen=True)
class Tokens:
    """Prompts, padded on the left, and their responses, padded on the right.

    prompt_ids [B, P] and response_ids [B, T] are int64 on the model's device. prompt_lengths and
    response_lengths [B] are int64 on the CPU, so that no size is ever read back from a device. Ids
    at padded positions are never read: masks come from lengths, not from a pad id.

    ``trained`` [B, T] bool on the CPU is False at tokens inside of responses that are read, but not
    trained on, such as a tool's output, which the policy did not choose. None: all are trained on.

    ``prompt_groups`` [B] int64 on the CPU are equal for rows with the same prompt, which a packed
    pass computes once. None: every row has a prompt of its own.

    Packed passes read ``packed_ids`` [1, N], without padding. Padded ones read ``input_ids``
    [B, L], in which each row has its prompt, its response and then all padding. Real tokens of a
    causal model never attend to that padding, so that these passes need neither an attention mask
    nor position ids, and attention takes its fastest form.
    """

    prompt_ids: Tensor
    prompt_lengths: Tensor
    response_ids: Tensor
    response_lengths: Tensor
    trained: Tensor | None = None
    prompt_groups: Tensor | None = None

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    @property
    def device(self) -> torch.device:
        return self.prompt_ids.device

    def to(self, device: torch.device) -> Tokens:
        """Return the tokens on another device; masks and indices follow."""
        if device == self.device:
            return self
        return replace(
            self,
            prompt_ids=self.prompt_ids.to(device),
            response_ids=self.response_ids.to(device),
        )

    @property
    def lengths(self) -> Tensor:
        """[B] real tokens of prompt and response together, int64 on the CPU."""
        return self.prompt_lengths + self.response_lengths

    @cached_property
    def _columns(self) -> Tensor:
        """Positions [L] int64 on the CPU: 0, 1, ..."""
        return torch.arange(int(self.lengths.max()) if len(self) else 0, device="cpu")

    @cached_property
    def input_ids(self) -> Tensor:
        """[B, L] int64: each row's real tokens, then padding."""
        both = torch.cat([self.prompt_ids, self.response_ids], dim=1)
        first = self.prompt_ids.shape[1] - self.prompt_lengths[:, None]
        return both.gather(1, (first + self._columns).clamp_max(both.shape[1] - 1).to(self.device))

    @cached_property
    def without_last(self) -> Tokens:
        """The tokens without each response's last one, whose state no log-prob or value needs."""
        return replace(
            self,
            response_ids=self.response_ids[:, :-1],
            response_lengths=self.response_lengths - 1,
            trained=None if self.trained is None else self.trained[:, :-1],
        )

    @cached_property
    def packing(self) -> Packing:
        """Where the tokens stand in one row without padding, in which each prompt stands once."""
        return pack(self)

    @cached_property
    def packed_ids(self) -> Tensor:
        """[1, N] int64: ids of the packed tokens."""
        rows, columns = (x.to(self.device) for x in (self.packing.rows, self.packing.columns))
        return self.input_ids[rows, columns][None]

    @cached_property
    def padded_places(self) -> tuple[Tensor, Tensor]:
        """Row and column [B, L] of each token, int64 on the CPU; of the last beyond a row's end."""
        columns = torch.minimum(self._columns, self.lengths[:, None] - 1)
        return torch.arange(len(self), device="cpu")[:, None].expand_as(columns), columns

    @cached_property
    def packed_index(self) -> Tensor:
        """[B, L] int64: where each token stands among the packed ones."""
        return self.index_of(self.packing, *self.padded_places).to(self.device)

    def index_of(self, places: Places, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the index of tokens ``columns`` of sequences ``rows``, where ``places`` has them.

        All are int64 on the CPU, of the same shape.
        """
        of_response = columns - self.prompt_lengths[rows]
        of_prompt = places.prompt_first[rows] + columns
        return torch.where(of_response < 0, of_prompt, places.response_first[rows] + of_response)

    @cached_property
    def attention_mask(self) -> Tensor:
        """[B, L] int64, 1 at real tokens, for modules that take a mask."""
        return (self._columns < self.lengths[:, None]).long().to(self.device)

    @cached_property
    def _response_mask(self) -> Tensor:
        """``response_mask``, on the CPU."""
        positions = torch.arange(self.response_ids.shape[1], device="cpu")
        real = positions < self.response_lengths[:, None]
        return real if self.trained is None else real & self.trained

    @cached_property
    def response_mask(self) -> Tensor:
        """[B, T] bool, true at response tokens that are trained on.

        EOS is one; nothing after it is.
        """
        return self._response_mask.to(self.device)

    @cached_property
    def trained_counts(self) -> Tensor:
        """[B] response tokens that are trained on, int64 on the CPU."""
        return self.response_lengths if self.trained is None else self._response_mask.sum(1)

    @cached_property
    def last_trained(self) -> Tensor:
        """[B] index of the last response token that is trained on, int64 on the CPU; 0 if none."""
        if self.trained is None:
            return self.response_lengths - 1
        positions = torch.arange(self.response_ids.shape[1], device="cpu")
        return (positions * self._response_mask).amax(1)

    @cached_property
    def _before_response(self) -> Tensor:
        """[B, T] int64: index in ``input_ids`` of the token before each response token."""
        positions = torch.arange(self.response_ids.shape[1], device="cpu")
        before = self.prompt_lengths[:, None] - 1 + positions
        return before.clamp_max(len(self._columns) - 1).to(self.device)

    def select(self, rows: Tensor) -> Tokens:
        """Select rows (int64 on the CPU), without the columns that are padding in all of them."""
        prompts, responses = self.prompt_lengths[rows], self.response_lengths[rows]
        first = self.prompt_ids.shape[1] - int(prompts.max())
        index = rows.to(self.device)
        return Tokens(
            self.prompt_ids[index, first:],
            prompts,
            self.response_ids[index, : int(responses.max())],
            responses,
            None if self.trained is None else self.trained[rows, : int(responses.max())],
            None if self.prompt_groups is None else self.prompt_groups[rows],
        )

    def without_training(self, rows: Tensor) -> Tokens:
        """Return the same tokens, of which ``rows`` (bool [B] on the CPU) are not trained on."""
        return replace(self, trained=self._response_mask & ~rows[:, None])

    def repeated(self, times: int) -> Tokens:
        """Repeat all rows ``times`` times, one copy after the other."""
        return Tokens(
            self.prompt_ids.repeat(times, 1),
            self.prompt_lengths.repeat(times),
            self.response_ids.repeat(times, 1),
            self.response_lengths.repeat(times),
            None if self.trained is None else self.trained.repeat(times, 1),
            None if self.prompt_groups is None else self.prompt_groups.repeat(times),
        )

    def before_response(self, per_token: Tensor) -> Tensor:
        """Select the entries of the tokens before each response token: [B, L, ...] -> [B, T, ...].

        Each row's last token may lack: [B, L - 1, ...]. Beyond a response they are some other
        token's.
        """
        index = self._before_response.clamp_max(per_token.shape[1] - 1)
        index = index.view(*self.response_ids.shape, *[1] * (per_token.dim() - 2))
        return per_token.gather(1, index.expand(-1, -1, *per_token.shape[2:]))

    def sequences(self) -> list[Tensor]:
        """Return each row's real tokens, [length] int64: the prompt's, then the response's."""
        return [self.input_ids[b, :length] for b, length in enumerate(self.lengths.tolist())]

    def at_response(self, per_token: Sequence[Tensor]) -> Tensor:
        """Select the numbers of the states before each response token.

        ``per_token`` has one number for each real token of each row, as ``sequences`` has them.
        Returns [B, T], 0 beyond a response.
        """
        out = per_token[0].new_zeros(self.response_ids.shape)
        pairs = zip(self.prompt_lengths.tolist(), self.response_lengths.tolist(), strict=True)
        rows = [
            torch.nn.functional.pad(row[p - 1 : p - 1 + t], (0, out.shape[1] - t))
            for row, (p, t) in zip(per_token, pairs, strict=True)
        ]
        return torch.stack(rows) if rows else out


def position_ids(attention_mask: Tensor) -> Tensor:
    """Compute positions [B, L] from a mask [B, L]: cumsum(mask) - 1, not below 0."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> Tensor:
    """Pad rows of ids on the left -> [B, longest] int64."""
    width = max(map(len, rows))
    padded = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=device)


def pad_right(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> Tensor:
    """Pad rows of ids on the right -> [B, longest] int64."""
    width = max(map(len, rows))
    padded = [list(row) + [pad_id] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=device)


def make_tokens(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
) -> Tokens:
    """Make Tokens from lists of prompt and response ids."""
    groups: dict[tuple[int, ...], int] = {}
    of_rows = [groups.setdefault(tuple(prompt), len(groups)) for prompt in prompts]
    return Tokens(
        pad_left(prompts, pad_id, device),
        torch.tensor([len(p) for p in prompts], device="cpu"),
        pad_right(responses, pad_id, device),
        torch.tensor([len(r) for r in responses], device="cpu"),
        prompt_groups=torch.tensor(of_rows, dtype=torch.int64, device="cpu"),
    )


def join_tokens(parts: Sequence[Tokens]) -> Tokens:
    """Return the rows of all parts."""
    pad = torch.nn.functional.pad
    widest = max(part.prompt_ids.shape[1] for part in parts)
    prompts = [pad(part.prompt_ids, (widest - part.prompt_ids.shape[1], 0)) for part in parts]
    widest = max(part.response_ids.shape[1] for part in parts)
    room = [widest - part.response_ids.shape[1] for part in parts]
    trained = None
    if any(part.trained is not None for part in parts):
        masks = [part._response_mask for part in parts]
        trained = torch.cat([pad(mask, (0, n)) for mask, n in zip(masks, room, strict=True)])
    return Tokens(
        torch.cat(prompts),
        torch.cat([part.prompt_lengths for part in parts]),
        torch.cat([pad(part.response_ids, (0, n)) for part, n in zip(parts, room, strict=True)]),
        torch.cat([part.response_lengths for part in parts]),
        trained,
        _join_groups(parts),
    )


def _join_groups(parts: Sequence[Tokens]) -> Tensor:
    """Return groups of equal prompts; a prompt of several parts is a group in each."""
    joined, count = [], 0
    for part in parts:
        own = torch.arange(len(part), device="cpu")
        groups = own if part.prompt_groups is None else part.prompt_groups
        joined.append(groups + count)
        count += int(groups.max()) + 1 if len(groups) else 0
    return torch.cat(joined)


def check_seeds(seeds: Any, count: int) -> None:
    """Check that ``seeds`` are [count] int64.

    Raises:
        TypeError, ValueError: they are not.
    """
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64:
        got = seeds.dtype if isinstance(seeds, Tensor) else type(seeds).__name__
        raise TypeError(f"seeds: got {got}, expected an int64 tensor [{count}]")
    if seeds.shape != (count,):
        raise ValueError(
            f"seeds: got shape {list(seeds.shape)}, expected [{count}], one per prompt"
        )
