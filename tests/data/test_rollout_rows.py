"""Rows of rollouts: selected, joined, and tokens that are not trained on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ppo_fast.data.rollout import Rollout, join, select_rows
from ppo_fast.data.tokens import Tokens, make_tokens

CPU = torch.device("cpu")
ROWS = [([1, 2], [3]), ([4], [5, 6, 7]), ([8, 9, 10], [11, 12]), ([13], [14])]


def rollout(rows: list, trained: list | None = None) -> Rollout:
    made = Rollout.from_tokens(
        [p for p, _ in rows],
        [r for _, r in rows],
        logprobs=[[-float(t) for t in r] for _, r in rows],
        finished=[len(r) < 3 for _, r in rows],
        trained=trained,
    )
    texts = [str(p) for p, _ in rows]
    return replace(made, prompts=texts, completions=[str(r) for _, r in rows])


def contents(found: Rollout) -> list:
    tokens = found.tokens
    lengths = tokens.response_lengths.tolist()
    return [
        (
            ids.tolist(),
            tokens.response_mask[i, : lengths[i]].tolist(),
            found.logprobs[i, : lengths[i]].tolist(),
            bool(found.finished[i]),
            found.prompts[i],
            found.completions[i],
        )
        for i, ids in enumerate(tokens.sequences())
    ]


def test_selected_rows_are_those_of_a_rollout_of_their_own():
    found = select_rows(rollout(ROWS), torch.tensor([2, 0]))
    assert contents(found) == contents(rollout([ROWS[2], ROWS[0]]))
    assert found.tokens.response_ids.shape == (2, 2)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_joined_rollouts_are_one(cut):
    found = join([rollout(ROWS[:cut]), rollout(ROWS[cut:])])
    assert contents(found) == contents(rollout(ROWS))


def test_joining_keeps_what_is_not_trained_on():
    masked = [[True], [True, False, True]]
    found = join([rollout(ROWS[:2], masked), rollout(ROWS[2:])])
    assert contents(found) == contents(rollout(ROWS, [*masked, [True, True], [True]]))


def test_log_probs_that_one_side_does_not_know_are_unknown():
    other = replace(rollout(ROWS[2:]), logprobs=None)
    assert join([rollout(ROWS[:2]), other]).logprobs is None


def tokens(trained: list) -> Tokens:
    made = make_tokens([p for p, _ in ROWS], [r for _, r in ROWS], 0, CPU)
    return replace(made, trained=torch.tensor(trained))


TRAINED = [[True, True, True], [True, False, False], [False, True, True], [False, True, True]]


def test_tokens_that_are_not_trained_on():
    found = tokens(TRAINED)
    mask = [[True, False, False], [True, False, False], [False, True, False], [False] * 3]
    assert found.response_mask.tolist() == mask
    assert found.trained_counts.tolist() == [1, 1, 1, 0]
    assert found.last_trained.tolist() == [0, 0, 1, 0]
    assert found.response_lengths.tolist() == [1, 3, 2, 1], "they are read"
    part = found.select(torch.tensor([2, 3]))
    assert part.response_mask.tolist() == [[False, True], [False, False]]
    assert part.input_ids.tolist() == [[8, 9, 10, 11, 12], [13, 14, 0, 0, 0]]


def test_all_tokens_are_trained_on_by_default():
    found = make_tokens([p for p, _ in ROWS], [r for _, r in ROWS], 0, CPU)
    assert found.trained_counts.tolist() == [1, 3, 2, 1]
    assert found.last_trained.tolist() == [0, 2, 1, 0]
    none = found.without_training(torch.tensor([False, True, False, False]))
    assert none.trained_counts.tolist() == [1, 0, 2, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trained": [[True]]}, "trained: got 1 entries, expected 4"),
        ({"trained": [[True], [True], [True], [True]]}, r"trained\[1\]: got 1 numbers for 3"),
        ({"samples_per_prompt": 3}, "samples_per_prompt: got 3 for 4 responses"),
        ({"finished": [True]}, "finished: got 1 entries, expected 4"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Rollout.from_tokens([p for p, _ in ROWS], [r for _, r in ROWS], **options)
