"""make_experience on a small case with all numbers computed by hand."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch

from ppo_fast.config import PPOConfig
from ppo_fast.critics.baselines import Baseline
from ppo_fast.data.experience import Experience
from ppo_fast.data.tokens import Tokens, make_tokens
from ppo_fast.learning.make_experience import less_kl, make_experience
from ppo_fast.ops import TokenLogprobs
from ppo_fast.rewards.shaping import place_scores
from ppo_fast.rollout import Rollout, Sampling

CPU = torch.device("cpu")
PER_TOKEN = ("old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")


def assert_rows(found: torch.Tensor, expected: list[list[float]]) -> None:
    """Compare with rows of different lengths, with 0 after the end of each."""
    width = found.shape[1]
    padded = [[*row, *[0.0] * (width - len(row))] for row in expected]
    torch.testing.assert_close(
        found.double(), torch.tensor(padded, dtype=torch.float64), rtol=0, atol=1e-6
    )


# By hand. Responses of ids (2, 4, 6) and (8); the reference gives id n the log-prob -n / 8, the
# critic its state the value n / 4. Every number below is exact in float32.

HAND = make_tokens([[3, 5], [7]], [[2, 4, 6], [8]], 0, CPU)
OLD = torch.tensor([[-0.5, -0.25, -1.25], [-0.5, 0.0, 0.0]])
SCORES = torch.tensor([1.0, -2.0])
# log pi - log ref: -1/4, 1/4, -1/2 and 1/2; half of it is the penalty
REWARDS = [[0.125, -0.125, 1.25], [-2.25]]
HAND_CONFIG = PPOConfig(
    gamma=0.5, gae_lambda=0.5, kl_penalty=0.5, kl_in="reward", whiten_advantages=False
)


class TableModel:
    """Replaces a LanguageModel: log-probs from a table by token id."""

    split, packed = None, True
    compute_dtype = own_autocast = None
    dtype = torch.float32
    model = torch.nn.Linear(1, 1)

    def shares_head_with(self, other: object) -> bool:
        return False

    def forward(self, tokens: Tokens, trunk_states: torch.Tensor | None) -> None:
        assert trunk_states is None

    def logprobs(self, forward: None, tokens: Tokens, *, temperature: float) -> TokenLogprobs:
        values = -tokens.response_ids / (8.0 * temperature)
        return TokenLogprobs(values.masked_fill(~tokens.response_mask, 0.0), None)


class TableCritic:
    bootstraps, normalizes = True, False

    def values_of_rollout(self, rollout: Rollout, *_: object) -> torch.Tensor:
        tokens = rollout.tokens
        return (tokens.response_ids / 4.0).masked_fill(~tokens.response_mask, 0.0)


def hand_rollout(**sampling: float) -> Rollout:
    return Rollout(
        tokens=HAND,
        logprobs=OLD,
        sampling_logprobs=OLD,
        finished=torch.tensor([True, False]),
        sampling=Sampling(3, **sampling),
        trunk_states=None,
        prompts=["a", "b"],
        completions=["c", "d"],
    )


def by_hand(critic: object | None = None, rollout: Rollout | None = None, **changes) -> Experience:
    return make_experience(
        rollout or hand_rollout(),
        SCORES,
        policy=TableModel(),
        reference=TableModel(),
        critic=critic or Baseline("baseline", HAND_CONFIG.gamma),
        config=replace(HAND_CONFIG, **changes),
    )


def test_the_score_sits_on_the_last_token_and_the_kl_on_every_one():
    experience = by_hand(TableCritic())
    assert_rows(experience.old_logprobs, [[-0.5, -0.25, -1.25], [-0.5]])
    assert_rows(experience.ref_logprobs, [[-0.25, -0.5, -0.75], [-1.0]])
    assert_rows(experience.rewards, REWARDS)
    assert experience.scores.tolist() == [1.0, -2.0], "before KL"


@pytest.mark.parametrize("changes", [{"kl_in": "loss"}, {"kl_penalty": 0.0}])
def test_without_kl_in_the_reward_there_is_the_score_alone(changes):
    assert_rows(by_hand(TableCritic(), **changes).rewards, [[0.0, 0.0, 1.0], [-2.0]])


@pytest.mark.parametrize(
    ("estimator", "kl"),
    [
        ("abs", [0.25, 0.25, 0.5, 0.5]),
        ("k2", [1 / 32, 1 / 32, 1 / 8, 1 / 8]),
        ("k3", [math.expm1(d) - d for d in (0.25, -0.25, 0.5, -0.5)]),
    ],
)
def test_other_estimators_in_the_reward(estimator, kl):
    config = replace(HAND_CONFIG, kl_estimator=estimator)
    placed, ref = place_scores(SCORES, HAND), -HAND.response_ids / 8.0
    rewards = less_kl(placed, OLD, ref, HAND.response_mask, config.kl_penalty, config)
    a, b, c, d = (-0.5 * k for k in kl)
    assert_rows(rewards, [[a, b, 1.0 + c], [-2.0 + d]])


def test_advantages_and_returns_with_a_value_function():
    experience = by_hand(TableCritic())
    assert_rows(experience.values, [[0.5, 1.0, 1.5], [2.0]])
    # delta = 1.25 - 1.5;  -0.125 + 0.75 - 1;  0.125 + 0.5 - 0.5;  -2.25 - 2; decay 1/4
    advantages = [[0.015625, -0.4375, -0.25], [-4.25]]
    assert_rows(experience.advantages, advantages)
    assert_rows(experience.returns, [[0.515625, 0.5625, 1.25], [-2.25]])


def test_whitened_advantages_and_returns_from_unwhitened_ones():
    plain, white = by_hand(TableCritic()), by_hand(TableCritic(), whiten_advantages=True)
    valid = white.advantages[HAND.response_mask].tolist()
    assert statistics.mean(valid) == pytest.approx(0, abs=1e-6)
    assert statistics.variance(valid) == pytest.approx(1, abs=1e-6)
    raw = [0.015625, -0.4375, -0.25, -4.25]
    mean, deviation = statistics.mean(raw), statistics.stdev(raw)
    first, second, third, fourth = ((a - mean) / deviation for a in raw)
    assert_rows(white.advantages, [[first, second, third], [fourth]])
    assert torch.equal(white.returns, plain.returns)
    assert white.metrics["mean_advantage"] == pytest.approx(statistics.mean(raw))


def test_the_baseline_is_of_the_other_sequences_and_uses_lambda_one():
    experience = by_hand(None)
    # scores 1 and -2, discounted by 0.5 a token; advantages are discounted sums of what is left,
    # less the baseline
    assert_rows(experience.values, [[-0.5, -1.0, -2.0], [1.0]])
    assert_rows(experience.advantages, [[0.875, 1.5, 3.25], [-3.25]])
    assert torch.equal(experience.advantages, by_hand(None, gae_lambda=0.0).advantages)


def test_beyond_a_response_everything_is_exactly_zero():
    for critic in (TableCritic(), None):
        for whiten in (True, False):
            experience = by_hand(critic, whiten_advantages=whiten)
            for name in PER_TOKEN:
                values = getattr(experience, name)
                assert values.dtype == torch.float32
                assert values.shape == (2, 3)
                assert (values[~HAND.response_mask] == 0).all(), name


def test_metrics_by_hand():
    metrics = by_hand(TableCritic()).metrics
    assert metrics["mean_reward"] == -0.5, "of the scores, before KL"
    assert metrics["reward_std"] == 1.5
    assert metrics["kl_divergence"] == 0.0, "-1/4 + 1/4 - 1/2 + 1/2"
    assert metrics["mean_advantage"] == -4.921875 / 4
    assert metrics["entropy"] == 2.5 / 4
    assert metrics["response_length"] == 2.0
    assert metrics["finished_fraction"] == 0.5
    assert all(type(value) is float for value in metrics.values())


def test_kl_metrics_are_a_token_mean_and_a_sequence_mean():
    rollout = replace(hand_rollout(), logprobs=OLD + 1.0 * HAND.response_mask)
    metrics = by_hand(TableCritic(), rollout).metrics
    assert metrics["kl_divergence"] == 1.0
    assert metrics["kl_sequence"] == 2.0


# Which log-probs are the old ones


def test_old_logprobs_are_those_of_the_sampling_pass():
    rollout = hand_rollout(temperature=0.5)
    assert by_hand(TableCritic(), rollout).old_logprobs is rollout.logprobs


@pytest.mark.parametrize("sampling", [{"top_k": 5}, {"top_p": 0.9}])
def test_a_truncated_sampler_means_recomputed_old_logprobs(sampling):
    experience = by_hand(TableCritic(), hand_rollout(**sampling))
    assert_rows(experience.old_logprobs, [[-0.25, -0.5, -0.75], [-1.0]])
    assert_rows(experience.rewards, [[0.0, 0.0, 1.0], [-2.0]])


def test_half_precision_means_recomputed_old_logprobs():
    policy = TableModel()
    policy.model = torch.nn.Linear(1, 1).bfloat16()
    experience = make_experience(
        hand_rollout(),
        SCORES,
        policy=policy,
        reference=TableModel(),
        critic=Baseline("baseline", 1.0),
        config=HAND_CONFIG,
    )
    assert_rows(experience.old_logprobs, [[-0.25, -0.5, -0.75], [-1.0]])
