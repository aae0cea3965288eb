"""Shaping of rewards, on numbers computed by hand."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean, stdev

import pytest
import torch

from ppo_fast.config import PPOConfig
from ppo_fast.data.tokens import make_tokens
from ppo_fast.rewards.shaping import (
    NO_SCORES,
    length_penalty,
    merge_moments,
    place_scores,
    shape_rewards,
)

TOKENS = make_tokens([[1]] * 4, [[1], [1, 2], [1, 2, 3], [1, 2]], 0, torch.device("cpu"))
SCORES = torch.tensor([3.0, -1.0, 2.0, 6.0])
FINISHED = torch.tensor([True, True, False, True])


def shaped(rewards: torch.Tensor | None = None, samples: int = 1, **settings) -> torch.Tensor:
    rewards = place_scores(SCORES, TOKENS) if rewards is None else rewards
    config = PPOConfig(max_length=3, **settings)
    return shape_rewards(rewards, TOKENS, FINISHED, config, samples_per_prompt=samples)[0]


def test_without_settings_nothing_changes():
    assert torch.equal(shaped(), place_scores(SCORES, TOKENS))


def test_scores_sit_on_the_last_token_that_the_policy_chose():
    placed = [[3, 0, 0], [0, -1, 0], [0, 0, 2], [0, 6, 0]]
    assert place_scores(SCORES, TOKENS).tolist() == placed
    chosen = torch.ones(4, 3, dtype=torch.bool)
    chosen[2, 1:] = False
    tokens = replace(TOKENS, trained=chosen)
    assert place_scores(SCORES, tokens)[2].tolist() == [2.0, 0.0, 0.0]
    of_tokens = torch.full((4, 3), 5.0)
    assert place_scores(of_tokens, tokens)[2].tolist() == [15.0, 0.0, 0.0]


def test_a_response_that_was_cut_off_is_penalised():
    assert shaped(missing_eos_penalty=1.5).sum(1).tolist() == [3.0, -1.0, 0.5, 6.0]


def test_the_penalty_of_length_grows_by_a_line():
    config = PPOConfig(max_length=100, overlong_buffer=20, overlong_penalty=2.0)
    lengths = torch.tensor([1, 80, 81, 90, 100])
    assert length_penalty(lengths, 100, config).tolist() == pytest.approx([0, 0, 0.1, 1.0, 2.0])
    found = shaped(overlong_buffer=2, overlong_penalty=1.0).sum(1)
    assert found.tolist() == [3.0, -1.5, 1.0, 5.5]


@pytest.mark.parametrize(
    ("over", "groups"), [("batch", [[3, -1, 2, 6]]), ("group", [[3, -1], [2, 6]])]
)
def test_normalisation_over_the_batch_and_over_groups(over, groups):
    found = shaped(samples=2, reward_normalization=over, samples_per_prompt=2)
    expected = [(x - mean(g)) / (stdev(g) + 1e-4) for g in groups for x in g]
    assert found.sum(1).tolist() == pytest.approx(expected)
    assert (found != 0).sum() == 4, "on last tokens alone"


def test_normalisation_of_rewards_for_tokens():
    rewards = torch.tensor([[3.0, 0, 0], [1, -2, 0], [2, 2, -2], [0, 6, 0]])
    found = shaped(rewards, reward_normalization="batch")
    std = stdev([3, -1, 2, 6]) + 1e-4
    assert found[2].tolist() == pytest.approx([2 / std, 2 / std, (-2 - 2.5) / std])


def test_normalisation_by_all_scores_so_far():
    config = PPOConfig(max_length=3, reward_normalization="running")
    seen, moments = [], NO_SCORES
    for batch in ([3.0, -1.0, 2.0, 6.0], [10.0, 0.0, 0.0, -4.0], [1.0, 1.0, 1.0, 1.0]):
        seen += batch
        rewards = place_scores(torch.tensor(batch), TOKENS)
        found, moments = shape_rewards(rewards, TOKENS, FINISHED, config, moments=moments)
        expected = [(x - mean(seen)) / (stdev(seen) + 1e-4) for x in batch]
        assert found.sum(1).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert moments.number == 12


def test_equal_scores_become_zero():
    rewards = place_scores(torch.full((4,), 7.0), TOKENS)
    assert not shaped(rewards, reward_normalization="batch").any()


def test_scale_and_clip_come_last():
    found = shaped(reward_scale=2.0, reward_clip=5.0, missing_eos_penalty=1.0)
    assert found.sum(1).tolist() == [5.0, -2.0, 2.0, 5.0]


def test_moments_of_far_numbers_are_exact():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, generator=generator, dtype=torch.float64) + 1e6 for n in (3, 50, 1)]
    moments = NO_SCORES
    for part in parts:
        moments = merge_moments(moments, part)
    numbers = torch.cat(parts)
    assert moments.mean == pytest.approx(float(numbers.mean()), rel=1e-14)
    assert moments.squares == pytest.approx(float(numbers.var() * 53), rel=1e-8)
