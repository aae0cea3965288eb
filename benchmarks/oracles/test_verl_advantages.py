"""Advantages of verl's estimators: ours against theirs."""

from __future__ import annotations

import pytest
import torch
from oracles.cases import MASKS, Case, for_cases, with_gradients
from oracles.ledger import EPSILON_OF_MEANS, line
from oracles.ours import advantages_of
from oracles.verl_side import core_algos, groups, outcome, torch_functional
from torch import Tensor

from ppo_fast.config import PPOConfig
from ppo_fast.ops import gae, whiten
from ppo_fast.rewards.shaping import EPSILON, place_scores

WITH_TOKENS = tuple(kind for kind in MASKS if kind != "empty rows")


def slack_of_means(values: Tensor) -> float:
    """Return how far that epsilon moves whitened values: the mean, in units of the deviation."""
    return EPSILON_OF_MEANS * (1 + float(values.abs().amax() / values.std()))


@for_cases()
def test_gae(case):
    gamma, lam = case.draw.choice((1.0, 0.99, 0.5)), case.draw.choice((1.0, 0.95, 0.3, 0.0))
    rewards, values = case.normal(), case.normal()
    ours = gae(rewards, values, mask=case.mask, gamma=gamma, lam=lam, impl=case.impl)
    if case.mask.sum() == 1:
        return  # see test_one_valid_token_or_none
    theirs = core_algos.compute_gae_advantage_return(rewards, values, case.floats, gamma, lam)
    advantages, returns = (x[case.mask] for x in theirs)
    line("verl", "compute_gae_advantage_return", "gae", "returns").agree(
        ours.returns[case.mask], returns, scale=values.abs().amax()
    )
    whitened = whiten(ours.advantages, mask=case.mask, impl=case.impl)
    line("verl", "compute_gae_advantage_return", "whiten(gae)", "advantages").agree(
        whitened[case.mask], advantages, slack=slack_of_means(ours.advantages[case.mask])
    )


@for_cases()
def test_whiten(case):
    values = case.normal(case.draw.choice((0.1, 1, 30)))
    upstream = case.normal().masked_fill(~case.mask, 0.0)
    if case.mask.sum() == 1:
        return
    ours, gradient = with_gradients(
        lambda x: whiten(x, mask=case.mask, impl=case.impl), values, upstream=upstream
    )
    theirs, other = with_gradients(
        lambda x: torch_functional.masked_whiten(x, case.floats), values, upstream=upstream
    )
    slack = slack_of_means(values[case.mask])
    where = line("verl", "masked_whiten", "whiten")
    where.agree(ours[case.mask], theirs[case.mask], slack=slack)
    # A token's gradient is a difference of three terms of upstream / std.
    scale = upstream.abs().sum() / values[case.mask].std()
    where.agree(gradient[case.mask], other[case.mask], scale=scale, slack=slack)


def test_one_valid_token_or_none():
    rewards, mask = torch.ones(2, 3), torch.zeros(2, 3)
    where = line(
        "verl",
        "masked_whiten",
        "whiten",
        "one valid token or none",
        "with one valid token or none ValueError; ours is 0",
    )
    for valid in (0, 1):
        mask[0, :valid] = 1
        with pytest.raises(ValueError, match="mask"):
            torch_functional.masked_whiten(rewards, mask)
        where.agree(whiten(rewards, mask=mask.bool()), torch.zeros(2, 3))


def scored(case: Case, samples: int | None = None) -> tuple[int, Tensor, Tensor]:
    """Return a group's number of samples, scores [B], and rewards [B, T]: scores at last tokens."""
    samples = case.make_groups(samples)
    scores = case.normal(of_rows=True)
    return samples, scores, place_scores(scores, case.tokens())


def in_deviations(scores: Tensor, samples: int) -> Tensor:
    """Return the largest score in units of the smallest standard deviation of a group."""
    return scores.abs().amax() / (scores.view(-1, samples).std(1).amin() + EPSILON)


@pytest.mark.parametrize("vectorized", ["", "_vectorized"])
@pytest.mark.parametrize("by_std", [True, False])
@for_cases()
def test_grpo(case, vectorized, by_std):
    estimator, ours = f"grpo{vectorized}", "group_norm" if by_std else "group_mean"
    samples, scores, rewards = scored(case)
    settings = {"index": groups(case.rows, samples), "norm_adv_by_std_in_grpo": by_std}
    found = advantages_of(ours, rewards, case.tokens(), samples)
    theirs = outcome(estimator, rewards, case.floats, epsilon=EPSILON, **settings)
    if vectorized:  # computes in float32
        found, theirs = found.float(), theirs.float()
    function = f"compute_{estimator}_outcome_advantage"
    options = "GRPO, epsilon 1e-4" if by_std else "Dr. GRPO"
    scale = in_deviations(scores, samples) if by_std else scores.abs().amax()
    line("verl", function, ours, options).agree(found, theirs, scale=scale)
    if by_std:
        line(
            "verl",
            function,
            ours,
            "default epsilon",
            "1e-6 is added to the standard deviation of a group, ours adds 1e-4",
        ).differ(found, outcome(estimator, rewards, case.floats, **settings), by=1e-7)


@pytest.mark.parametrize("vectorized", ["", "_vectorized"])
@for_cases()
def test_rloo(case, vectorized):
    samples, scores, rewards = scored(case)
    ours = advantages_of("baseline", rewards, case.tokens(), samples)
    index = groups(case.rows, samples)
    theirs = outcome(f"rloo{vectorized}", rewards, case.floats, index=index)
    where = line("verl", f"compute_rloo{vectorized}_outcome_advantage", "baseline", "RLOO")
    where.agree(ours, theirs, scale=scores.abs().amax())


@for_cases(60)
def test_rloo_of_one_sample(case):
    _, scores, rewards = scored(case, samples=1)
    index = groups(case.rows, 1)
    score = scores[:, None] * case.floats
    for estimator, advantage, name in (
        ("rloo", score, "the score"),
        ("rloo_vectorized", 0 * score, "0"),
    ):
        line(
            "verl",
            f"compute_{estimator}_outcome_advantage",
            "baseline",
            "one sample a prompt",
            f"the advantage of a single sample is {name}; ours compares with the batch's others",
        ).agree(outcome(estimator, rewards, case.floats, index=index), advantage)


@for_cases()
def test_reinforce_plus_plus(case):
    """Of gamma 1: with less, ours discounts the baseline too, before whitening."""
    _, scores, rewards = scored(case, samples=1)
    kl = case.normal(0.1) * case.floats
    if case.mask.sum() == 1:
        return
    ours = advantages_of("batch_mean", rewards, case.tokens(), 1, kl=kl, whitened=True)
    config = PPOConfig(gamma=1.0)
    theirs = outcome("reinforce_plus_plus", rewards - kl, case.floats, config=config)
    returns = (rewards - kl).flip(1).cumsum(1).flip(1)[case.mask]
    line(
        "verl",
        "compute_reinforce_plus_plus_outcome_advantage",
        "batch_mean, whitened",
        "REINFORCE++ of gamma 1, KL in the reward",
    ).agree(
        ours,
        theirs,
        scale=(returns.abs().amax() + scores.abs().amax()) / returns.std(),
        slack=slack_of_means(returns),
    )


@for_cases()
def test_reinforce_plus_plus_baseline(case):
    samples, scores, rewards = scored(case)
    ours = advantages_of("group_mean", rewards, case.tokens(), samples, whitened=True)
    index = groups(case.rows, samples)
    theirs = outcome("reinforce_plus_plus_baseline", rewards, case.floats, index=index)
    line(
        "verl",
        "compute_reinforce_plus_plus_baseline_outcome_advantage",
        "group_mean, whitened",
        "REINFORCE++ with a baseline",
    ).agree(ours, theirs, scale=in_deviations(scores, samples), slack=10 * EPSILON_OF_MEANS)
