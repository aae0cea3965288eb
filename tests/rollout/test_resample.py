"""Dynamic sampling, on rollouts that are written by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ppo_fast.data.rollout import Rollout
from ppo_fast.data.scores import Scores
from ppo_fast.rollout.resample import resample, without_signal


def rollout_of(prompts: list[int]) -> Rollout:
    """Two samples a prompt; the id of a prompt is that of its responses."""
    rows = [p for p in prompts for _ in range(2)]
    made = Rollout.from_tokens([[p] for p in rows], [[p] * (1 + p % 3) for p in rows])
    texts = [str(p) for p in rows]
    return replace(made, samples_per_prompt=2, prompts=texts, completions=texts)


def score(rollout: Rollout) -> torch.Tensor:
    """Equal for the samples of prompts from 10 on."""
    ids = rollout.tokens.prompt_ids[:, -1]
    second = torch.arange(len(ids)) % 2
    return ids + second * (ids < 10).float()


def run(prompts: list[int], spare: list[int], most: int) -> tuple[list[str], dict]:
    drawn = iter(spare)
    first = rollout_of(prompts)
    rollout, scores, metrics = resample(
        first,
        Scores(score(first)),
        [[p] for p in prompts],
        sample=lambda rows: rollout_of([p for (p,) in rows]),
        score=lambda r: Scores(score(r)),
        draw=lambda count: [[next(drawn)] for _ in range(count)],
        most=most,
    )
    assert torch.equal(scores.total, score(rollout))
    assert rollout.samples_per_prompt == 2
    return rollout.prompts[::2], metrics


def test_prompts_without_signal_are_replaced():
    found, metrics = run([1, 11, 2, 12], [3, 13, 4], 5)
    assert found == ["1", "2", "3", "4"]
    assert metrics == {"prompts_resampled": 3.0, "prompts_without_signal": 0.0}


def test_at_the_limit_they_are_kept():
    found, metrics = run([1, 11, 2, 12], [3, 13, 14], 2)
    assert found == ["1", "2", "3", "14"]
    assert metrics == {"prompts_resampled": 3.0, "prompts_without_signal": 0.25}


def test_all_of_a_batch_may_be_replaced():
    assert run([11, 12], [1, 2], 1)[0] == ["1", "2"]


def test_nothing_is_drawn_where_all_have_a_signal():
    assert run([1, 2], [], 3) == (
        ["1", "2"],
        {"prompts_resampled": 0.0, "prompts_without_signal": 0.0},
    )


@pytest.mark.parametrize("of_tokens", [False, True])
def test_which_prompts_have_no_signal(of_tokens):
    scores = torch.tensor([1.0, 1.0, 2.0, 3.0, 0.0, 0.0])
    if of_tokens:
        scores = torch.stack([scores / 2, scores / 2], 1)
    assert without_signal(scores, 2).tolist() == [True, False, True]
    assert without_signal(scores, 3).tolist() == [False, False]


def test_scores_of_tokens_are_joined_by_width():
    first = rollout_of([1, 10])  # responses of 2 tokens
    fives = torch.tensor([[5.0], [6.0]])
    scores = torch.ones(4, 2) * torch.tensor([1.0, 2.0, 3.0, 3.0])[:, None]
    rollout, scores, _ = resample(
        first,
        Scores(scores),
        [[1], [10]],
        sample=lambda rows: rollout_of([p for (p,) in rows]),
        score=lambda r: Scores(torch.ones(r.tokens.response_ids.shape) * fives),
        draw=lambda count: [[2]] * count,  # responses of 3 tokens
        most=1,
    )
    assert scores.total.tolist() == [[1, 1, 0], [2, 2, 0], [5, 5, 5], [6, 6, 6]]
    assert rollout.tokens.response_ids.shape == (4, 3)


def test_scores_of_tokens_are_cut_where_the_longest_response_is_replaced():
    first = rollout_of([1, 11])  # responses of 2 and of 3 tokens
    fives = torch.tensor([[5.0], [6.0]])
    scores = torch.ones(4, 3) * torch.tensor([1.0, 2.0, 3.0, 3.0])[:, None]
    rollout, scores, _ = resample(
        first,
        Scores(scores),
        [[1], [11]],
        sample=lambda rows: rollout_of([p for (p,) in rows]),
        score=lambda r: Scores(torch.ones(r.tokens.response_ids.shape) * fives),
        draw=lambda count: [[3]] * count,  # responses of 1 token
        most=1,
    )
    assert scores.total.shape == rollout.tokens.response_ids.shape == (4, 2)


def test_without_others_the_same_prompts_are_sampled_again():
    asked = []

    def sample(rows):
        asked.append(rows)
        return rollout_of([p for (p,) in rows])

    first = rollout_of([1, 11, 2])
    resample(
        first,
        Scores(score(first)),
        [[1], [11], [2]],
        sample=sample,
        score=lambda r: Scores(score(r)),
        draw=None,
        most=2,
    )
    assert asked == [[[11]], [[11]]]
