"""Packing: where tokens stand in a row without padding, in which a shared prompt stands once."""

from __future__ import annotations

import torch

from ppo_fast.data.packing import Block, packed_batches
from ppo_fast.data.tokens import Tokens, join_tokens, make_tokens
from ppo_fast.data.trunk_states import TrunkStates, join_trunk_states

CPU = torch.device("cpu")
A, B = [11, 12, 13], [21]


def tokens() -> Tokens:
    """Prompt A twice, with B between."""
    return make_tokens([A, B, A], [[1, 2], [3], [4, 5, 6]], 0, CPU)


def sequences(packed: Tokens) -> list[list[int]]:
    """Read the sequences from the packed ids."""
    rows = packed.packed_ids[0][packed.packed_index]
    return [row[:n].tolist() for row, n in zip(rows, packed.lengths.tolist(), strict=True)]


def test_a_shared_prompt_stands_once():
    packing = tokens().packing
    assert tokens().packed_ids.tolist() == [[11, 12, 13, 1, 2, 4, 5, 6, 21, 3]]
    assert packing.columns.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1]
    assert packing.blocks == (
        Block(0, 3),
        Block(3, 5, prefix=(0, 3)),
        Block(5, 8, prefix=(0, 3)),
        Block(8, 10),
    )
    assert sequences(tokens()) == [[*A, 1, 2], [*B, 3], [*A, 4, 5, 6]]


def test_rows_that_are_selected_joined_or_repeated_share_their_prompts():
    part = tokens().select(torch.tensor([2, 0]))
    assert len(part.packing) == 3 + 5
    assert sequences(part) == [[*A, 4, 5, 6], [*A, 1, 2]]
    both = join_tokens([tokens(), part])
    assert len(both.packing) == 10 + 8, "each part's prompts apart"
    assert sequences(both) == sequences(tokens()) + sequences(part)
    twice = tokens().repeated(2)
    assert len(twice.packing) == 3 + 5 + 5 + 1 + 2
    assert sequences(twice) == 2 * sequences(tokens())


def test_without_groups_every_row_has_a_prompt_of_its_own():
    t = tokens()
    alone = Tokens(t.prompt_ids, t.prompt_lengths, t.response_ids, t.response_lengths)
    assert len(alone.packing) == int(t.lengths.sum())
    assert [block.prefix for block in alone.packing.blocks] == [None] * 3
    assert sequences(alone) == sequences(t)
    assert len(join_tokens([alone, t]).packing) == int(t.lengths.sum()) + len(t.packing)


def test_batches_count_a_shared_prompt_once():
    many = make_tokens([A] * 4 + [B] * 3, [[1, 2]] * 7, 0, CPU)
    batches = packed_batches(many, 7)
    assert [batch.tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5, 6]]
    assert [len(many.select(batch).packing) for batch in batches] == [7, 7, 7]
    assert [b.tolist() for b in packed_batches(many, 1)] == [[row] for row in range(7)]
    assert [b.tolist() for b in packed_batches(many, 100)] == [[*range(7)]]


def test_trunk_states_of_a_shared_prompt_are_kept_once():
    t = tokens()
    padded = t.input_ids[..., None].float() + 0.5
    states = TrunkStates.pack(padded, t, whole=True)
    assert len(states.states) == len(t.packing) == 10
    for found in (
        states.padded(t),
        join_trunk_states([states, states]).select(torch.arange(3, 6)).padded(t),
    ):
        real = t.attention_mask.bool()
        assert torch.equal(found[real], padded[real])
    for rows in ([0], [2, 1], [2, 0]):
        index = torch.tensor(rows)
        part = t.select(index)
        found = states.select(index).packed(part)
        assert torch.equal(found[0, :, 0], part.packed_ids[0] + 0.5)
