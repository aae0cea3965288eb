"""Tokens: padding, masks and positions follow from lengths; batches are within max_tokens."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_fast.data.batches import batches_by_tokens
from ppo_fast.data.tokens import Tokens, make_tokens, pad_left, pad_right, position_ids

CPU = torch.device("cpu")
EOS = 9
# The prompts hold the pad id and both responses end with it: a mask made of ids would be wrong.
PROMPTS = [[5, 6, 7], [EOS]]
RESPONSES = [[3, EOS], [1, EOS, 4, EOS]]


def tokens(pad_id: int = EOS) -> Tokens:
    return make_tokens(PROMPTS, RESPONSES, pad_id, CPU)


rows_of_ids = st.lists(st.integers(0, 9), min_size=1, max_size=5)
batches = st.lists(st.tuples(rows_of_ids, rows_of_ids), min_size=1, max_size=6)


def test_padding_is_left_of_prompts_right_of_responses_and_after_the_rows_that_models_read():
    batch = tokens(pad_id=0)
    assert batch.prompt_ids.tolist() == [[5, 6, 7], [0, 0, EOS]]
    assert batch.response_ids.tolist() == [[3, EOS, 0, 0], [1, EOS, 4, EOS]]
    assert batch.input_ids.tolist() == [[5, 6, 7, 3, EOS], [EOS, 1, EOS, 4, EOS]]
    assert batch.input_ids.dtype == torch.int64
    longer = make_tokens([[5, 6], [7]], [[1], [2, 3, 4]], 0, CPU)
    assert longer.input_ids.tolist() == [[5, 6, 1, 0], [7, 2, 3, 4]]
    assert longer.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert pad_left([[1, 2], [3]], 0, CPU).tolist() == [[1, 2], [0, 3]]
    assert pad_right([[1, 2], [3]], 0, CPU).tolist() == [[1, 2], [3, 0]]


@pytest.mark.parametrize("pad_id", [0, 4, EOS])
def test_masks_come_from_lengths_whatever_the_pad_id(pad_id):
    batch = tokens(pad_id)
    assert batch.response_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.attention_mask.tolist() == [[1] * 5, [1] * 5]
    assert batch.lengths.tolist() == [5, 5]


def test_position_ids_count_real_tokens_from_zero():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3], [0, 0, 0, 0]]


def test_select_keeps_the_rows_in_order_and_drops_columns_that_none_needs():
    part = tokens().select(torch.tensor([1]))
    assert part.prompt_ids.tolist() == [[EOS]]
    assert part.response_ids.tolist() == [[1, EOS, 4, EOS]]
    part = tokens().select(torch.tensor([0]))
    assert part.input_ids.tolist() == [[5, 6, 7, 3, EOS]]
    both = tokens().select(torch.tensor([1, 0]))
    assert both.input_ids.tolist() == tokens().input_ids.flip(0).tolist()
    assert both.response_lengths.tolist() == [4, 2]


@given(batches, st.data())
def test_select_is_the_rows_alone(pairs, data):
    batch = make_tokens(*zip(*pairs, strict=True), 0, CPU)
    rows = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1, unique=True))
    index = torch.tensor(rows)
    part = batch.select(index)
    assert [s.tolist() for s in part.sequences()] == [pairs[i][0] + pairs[i][1] for i in rows]
    assert part.prompt_ids.shape[1] == max(len(pairs[i][0]) for i in rows)
    assert part.response_ids.shape[1] == max(len(pairs[i][1]) for i in rows)
    width = max(len(pairs[i][0] + pairs[i][1]) for i in rows)
    mask = part.attention_mask  # at padding, any position id is allowed
    assert torch.equal(batch.input_ids[index, :width] * mask, part.input_ids * mask)
    assert torch.equal(batch.attention_mask[index, :width], mask)


def test_sequences_are_the_real_tokens():
    assert [s.tolist() for s in tokens().sequences()] == [[5, 6, 7, 3, EOS], [EOS, 1, EOS, 4, EOS]]


def test_at_response_is_the_state_before_each_token():
    """States are numbered from 10 in the first sequence and from 20 in the second."""
    per_token = [torch.arange(10.0, 15.0), torch.arange(20.0, 25.0)]
    # the first response token of row 0 follows token 2; of row 1, token 0
    expected = [[12.0, 13.0, 0.0, 0.0], [20.0, 21.0, 22.0, 23.0]]
    assert tokens().at_response(per_token).tolist() == expected


def test_at_response_passes_gradients_to_the_states_before_only():
    per_token = [torch.ones(5, requires_grad=True), torch.ones(5, requires_grad=True)]
    tokens().at_response(per_token).sum().backward()
    assert per_token[0].grad.tolist() == [0, 0, 1, 1, 0]
    assert per_token[1].grad.tolist() == [1, 1, 1, 1, 0]


@given(batches)
def test_at_response_and_before_response_are_the_same_reading(pairs):
    batch = make_tokens(*zip(*pairs, strict=True), 0, CPU)
    states = torch.arange(1.0, 1 + batch.input_ids.numel()).view(batch.input_ids.shape)
    rows = [row[mask.bool()] for row, mask in zip(states, batch.attention_mask, strict=True)]
    before = batch.before_response(states) * batch.response_mask
    assert torch.equal(batch.at_response(rows), before)
    wide = torch.stack([states, -states], dim=-1)
    assert torch.equal(batch.before_response(wide)[..., 1] * batch.response_mask, -before)


@given(st.lists(st.integers(1, 40), max_size=25), st.integers(1, 120))
def test_batches_hold_each_row_once_within_the_budget(lengths, budget):
    parts = batches_by_tokens(torch.tensor(lengths, dtype=torch.int64), budget)
    assert sorted(torch.cat(parts).tolist() if parts else []) == list(range(len(lengths)))
    for part in parts:
        assert part.dtype == torch.int64
        widest = max(lengths[i] for i in part.tolist())
        assert widest * len(part) <= budget or len(part) == 1


@given(st.lists(st.integers(1, 40), min_size=2, max_size=25), st.integers(40, 200))
def test_batches_are_of_similar_length_and_as_full_as_the_budget_allows(lengths, budget):
    parts = [part.tolist() for part in batches_by_tokens(torch.tensor(lengths), budget)]
    for part, following in pairwise(parts):
        assert min(lengths[i] for i in part) >= max(lengths[i] for i in following)
        assert max(lengths[i] for i in part) * (len(part) + 1) > budget
