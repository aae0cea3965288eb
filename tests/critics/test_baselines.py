"""Baselines, against means and standard deviations of Python's statistics module."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

import pytest
import torch

from ppo_fast.critics.baselines import BASELINES, Baseline, baseline, discounted
from ppo_fast.data.rollout import Rollout
from ppo_fast.data.sampling import Sampling
from ppo_fast.data.tokens import make_tokens

SCORES = [3.0, 6.0, -3.0, 0.0, 2.5, -1.0]
PROMPTS = [[1, 2], [3], [4, 5], [6], [7], [8]]
TOKENS = make_tokens(PROMPTS, [[1], [1, 2], [1, 2, 3], [1], [1, 2], [1]], 0, torch.device("cpu"))


def groups(size: int) -> list[list[float]]:
    return [SCORES[i : i + size] for i in range(0, len(SCORES), size)]


def found(name: str, size: int) -> list[float]:
    return baseline(torch.tensor(SCORES, dtype=torch.float64), name, size).tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_leave_one_out_is_the_mean_of_the_prompts_other_samples(size):
    of = groups(size) if size > 1 else [SCORES]
    expected = [mean(g[:i] + g[i + 1 :]) for g in of for i in range(len(g))]
    assert found("baseline", size) == pytest.approx(expected)


@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize("name", ["group_mean", "group_norm"])
def test_group_means(name, size):
    assert found(name, size) == pytest.approx([mean(g) for g in groups(size) for _ in g])


@pytest.mark.parametrize("size", [1, 3])
def test_the_batch_mean_is_over_all_prompts(size):
    assert found("batch_mean", size) == pytest.approx([mean(SCORES)] * 6)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_does_not_depend_on_the_order_of_prompts(name):
    moved = torch.tensor([4, 5, 0, 1, 2, 3])
    scores = torch.tensor(SCORES)
    assert torch.equal(baseline(scores[moved], name, 2), baseline(scores, name, 2)[moved])


def test_a_batch_of_one_has_a_baseline_of_zero():
    assert baseline(torch.tensor([5.0]), "baseline", 1).tolist() == [0.0]


def test_values_are_discounted_to_each_token_as_scores_are():
    values = discounted(torch.tensor([8.0, 8.0, 8.0, 8.0, 8.0, 8.0]), TOKENS, 0.5)
    assert values[2].tolist() == [2.0, 4.0, 8.0]
    assert values[1].tolist() == [4.0, 8.0, 0.0]


def test_values_are_those_of_the_last_token_that_the_policy_chose():
    chosen = torch.ones(6, 3, dtype=torch.bool)
    chosen[2, 2] = chosen[1, 0] = False
    values = discounted(torch.full((6,), 8.0), replace(TOKENS, trained=chosen), 0.5)
    assert values[2].tolist() == [4.0, 8.0, 0.0]
    assert values[1].tolist() == [0.0, 8.0, 0.0]


@pytest.mark.parametrize("name", ["group_mean", "group_norm"])
def test_a_group_critic_refuses_a_rollout_of_single_samples(name):
    drawn = torch.zeros(6, 3)
    rollout = Rollout(TOKENS, drawn, drawn, torch.ones(6) > 0, Sampling(3))
    with pytest.raises(ValueError, match=rf"critic='{name}' compares the samples of a prompt, and"):
        Baseline(name, 1.0).values_of_rollout(rollout, torch.tensor(SCORES), None, 100)
