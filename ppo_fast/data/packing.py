"""Packing: tokens of several sequences in one row without padding, and a shared prompt once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ppo_fast.data.tokens import Tokens


class Places(Protocol):
    """Index of the first token of each prompt and of each response, [B] int64 on the CPU."""

    @property
    def prompt_first(self) -> Tensor: ...

    @property
    def response_first(self) -> Tensor: ...


class Block(NamedTuple):
    """Tokens ``start`` to ``end`` of a packed row. Each attends to those before it in the block.

    prefix: start and end of the prompt that all of them attend to as well; None: there is none.
    """

    start: int
    end: int
    prefix: tuple[int, int] | None = None


@dataclass(frozen=True)
class Packing:
    """Where the tokens of B sequences stand in a row of N. All tensors are int64 on the CPU.

    A sequence stands there as one block. Of sequences with the same prompt, the prompt is a block,
    followed by a block for each response.

    prompt_first, response_first: [B] index of the first token of each prompt and response.
    rows, columns: [N] a sequence that the token belongs to, and the token's position in it.
    blocks: blocks in order; together they are the N tokens.
    """

    prompt_first: Tensor
    response_first: Tensor
    rows: Tensor
    columns: Tensor
    blocks: tuple[Block, ...]

    def __len__(self) -> int:
        return len(self.rows)


def pack(tokens: Tokens) -> Packing:
    """Return the packing of sequences in which every prompt stands once."""
    prompts, responses = tokens.prompt_lengths.tolist(), tokens.response_lengths.tolist()
    segments: list[tuple[int, int, int]] = []  # row, first column, length
    blocks: list[Block] = []
    prompt_first, response_first = [0] * len(tokens), [0] * len(tokens)
    end = 0

    def add(row: int, column: int, length: int, prefix: tuple[int, int] | None = None) -> None:
        nonlocal end
        segments.append((row, column, length))
        blocks.append(Block(end, end + length, prefix))
        end += length

    for members in rows_by_prompt(tokens):
        start, length = end, prompts[members[0]]
        if len(members) == 1:
            add(members[0], 0, length + responses[members[0]])
            response_first[members[0]] = start + length
        else:
            add(members[0], 0, length)
        for row in members:
            prompt_first[row] = start
            if len(members) > 1:
                response_first[row] = end
                add(row, length, responses[row], (start, start + length))
    of_segments = torch.tensor(segments, dtype=torch.int64, device="cpu").reshape(-1, 3)
    rows, first, lengths = of_segments.unbind(1)
    starts = lengths.cumsum(0) - lengths
    columns = torch.arange(end, device="cpu") - (starts - first).repeat_interleave(lengths)
    return Packing(
        torch.tensor(prompt_first, dtype=torch.int64, device="cpu"),
        torch.tensor(response_first, dtype=torch.int64, device="cpu"),
        rows.repeat_interleave(lengths),
        columns,
        tuple(block for block in blocks if block.start < block.end),
    )


def rows_by_prompt(tokens: Tokens) -> list[list[int]]:
    """Return the rows of each prompt, in the order of their first rows."""
    if tokens.prompt_groups is None:
        return [[row] for row in range(len(tokens))]
    members: dict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(tokens.prompt_groups.tolist()):
        members[group].append(row)
    return list(members.values())


def packed_batches(tokens: Tokens, max_tokens: int) -> list[Tensor]:
    """Group rows into batches of at most ``max_tokens`` tokens when packed: row indices of each.

    Rows with the same prompt follow one another. A longer sequence is a batch of its own.
    """
    prompts, responses = tokens.prompt_lengths.tolist(), tokens.response_lengths.tolist()
    batches: list[list[int]] = []
    room = 0
    for members in rows_by_prompt(tokens):
        read = False  # whether the batch has the prompt
        for row in members:
            needed = responses[row] + (0 if read else prompts[row])
            if not batches or needed > room:
                batches.append([])
                room, needed = max_tokens, responses[row] + prompts[row]
            batches[-1].append(row)
            room, read = room - needed, True
    return [torch.tensor(batch, device="cpu") for batch in batches]
