"""KL estimates, KL in the reward, value loss, weights of tokens: ours against verl's."""

from __future__ import annotations

import math

import pytest
import torch
from oracles.cases import for_cases, with_gradients
from oracles.ledger import line, loss_and_gradients_agree
from oracles.verl_side import core_algos, rollout_corr_helper

from ppo_fast.config import PPOConfig
from ppo_fast.learning.coefficients import adapted_kl
from ppo_fast.learning.importance import MAX_LOG_RATIO, importance_weights, mismatch_metrics
from ppo_fast.learning.make_experience import less_kl
from ppo_fast.ops import kl_estimate, value_loss
from ppo_fast.rewards.shaping import place_scores

WEIGHTS = "compute_rollout_correction_weights"
REJECTED = "compute_rollout_rejection_mask"


@pytest.mark.parametrize(
    ("theirs", "ours", "clamp"),
    [
        ("kl", "k1", False),
        ("k1", "k1", False),
        ("abs", "abs", False),
        ("mse", "k2", False),
        ("k2", "k2", False),
        ("low_var_kl", "k3", True),
        ("k3", "k3", True),
        ("kl+", "k1+k2", False),
        ("k1+", "k1+k2", False),
        ("k2+", "k2", False),
    ],
)
@for_cases(60)
def test_kl_penalty(case, theirs, ours, clamp):
    logprobs = case.logprobs()
    ref = logprobs + case.normal(case.draw.choice((0.1, 1, 5, 20)))
    upstream = case.normal().masked_fill(~case.mask, 0.0)
    settings = {"estimator": ours, "clamp": clamp, "impl": case.impl}
    value, gradient = with_gradients(
        lambda x: kl_estimate(x, ref, mask=case.mask, **settings), logprobs, upstream=upstream
    )
    found, other = with_gradients(
        lambda x: core_algos.kl_penalty(x, ref, theirs), logprobs, upstream=upstream
    )
    options = f"{theirs} is our {ours}" + (", clamped" if clamp else "")
    where = line("verl", "kl_penalty", "kl_estimate", options)
    scale = logprobs.abs().amax().clamp_min(1)  # k3 is a sum of three terms
    where.agree(value[case.mask], found[case.mask], scale=scale)
    where.agree(gradient, other, scale=scale * upstream.abs().amax())


@for_cases()
def test_rewards_less_kl(case):
    kl_coef, estimator = case.draw.choice((0.05, 0.5)), case.draw.choice(("k1", "abs", "k3"))
    old, scores = case.logprobs(), case.normal(of_rows=True)
    ref = case.near(old)
    placed = place_scores(scores, case.tokens())
    config = PPOConfig(kl_penalty=kl_coef, kl_estimator=estimator)
    ours = less_kl(placed, old, ref, case.mask, kl_coef, config)
    penalty = core_algos.kl_penalty(old, ref, estimator) * case.floats
    scale = ref.abs().amax()
    line("verl", "kl_penalty, in the reward", "less_kl", estimator).agree(
        ours, placed - kl_coef * penalty, scale=scale
    )
    if estimator == "k1":
        theirs = core_algos.compute_rewards(placed, old, ref, kl_coef)
        line("verl", "compute_rewards", "less_kl", "k1").agree(
            ours[case.mask], theirs[case.mask], scale=scale
        )


@for_cases()
def test_value_loss(case):
    clip = case.draw.choice((None, 0.05, 0.2))
    values, returns = case.normal(), case.normal()
    old = values + case.normal(case.draw.choice((0.01, 0.3, 1.0)))
    mode = case.draw.choice(("token-mean", "token-sum", "seq-mean-token-sum"))
    normalizer = {"token-sum": 1, "seq-mean-token-sum": int(case.mask.any(1).sum())}.get(mode)
    settings = {"mask": case.mask, "clip": clip, "normalizer": normalizer, "impl": case.impl}

    def ours(x):
        return value_loss(x, old_values=old, returns=returns, **settings).loss

    def theirs(x):
        batch = (x, returns, old, case.floats)
        return core_algos.compute_value_loss(*batch, clip or 1e6, mode)[0]

    options = f"{mode}; clipped or not"
    loss_and_gradients_agree(
        line("verl", "compute_value_loss", "value_loss", options),
        with_gradients(ours, values),
        with_gradients(theirs, values),
    )


def test_no_valid_token():
    numbers, mask = torch.ones(2, 3), torch.zeros(2, 3)
    assert core_algos.compute_value_loss(numbers, numbers, numbers, mask, 0.2)[0].isnan()
    ours = value_loss(numbers, old_values=None, returns=numbers, mask=mask.bool()).loss
    line(
        "verl", "agg_loss", "value_loss", "no valid token", "without a valid token NaN; ours is 0"
    ).agree(ours, torch.zeros(()))


@for_cases()
def test_adaptive_kl(case):
    target, horizon = case.draw.uniform(1, 10), case.draw.choice((100, 10_000))
    theirs = core_algos.AdaptiveKLController(0.2, target, horizon)
    ours = 0.2
    for _ in range(10):
        kl, count = case.draw.uniform(0, 20), case.draw.randint(1, 64)
        theirs.update(kl, count)
        ours = adapted_kl(ours, kl, target, count / horizon)
    where = line("verl", "AdaptiveKLController", "adapted_kl", "runs of ten steps")
    where.agree(torch.tensor(ours).double(), torch.tensor(float(theirs.value)).double())


@for_cases()
def test_importance_weights(case):
    low, high = case.draw.choice((0.2, 0.5, 0.9)), case.draw.choice((1.1, 2.0, 5.0))
    log_ratios = case.normal(case.draw.choice((0.05, 0.5, 3, 15)))
    theirs = rollout_corr_helper.compute_rollout_correction_weights
    if not importance_weights(log_ratios, case.mask, "mask", (low, high)).any():
        with pytest.raises(ZeroDivisionError):  # its metrics divide by the sum of the weights
            theirs(log_ratios, case.floats, "token", f"{low}_{high}")
        return
    for kind, level, bounds, ends, options in (
        ("truncate", "token", high, (0.0, high), "TIS"),
        ("mask", "token", f"{low}_{high}", (low, high), "IcePop"),
        ("sequence-truncate", "sequence", high, (0.0, high), "TIS of sequences"),
    ):
        if kind == "sequence-truncate" and log_ratios.abs().amax() > MAX_LOG_RATIO:
            continue  # see test_product_of_extreme_ratios
        # exp of a sum has the sum's rounding as its relative error.
        line("verl", WEIGHTS, f"importance_weights {kind!r}", options).agree(
            importance_weights(log_ratios, case.mask, kind, ends),
            theirs(log_ratios, case.floats, level, bounds)[0],
            scale=high * log_ratios.abs().sum(1).amax().clamp(1, 20),
        )


def test_product_of_extreme_ratios():
    log_ratios, mask = torch.tensor([[25.0, -24.0, -1.5]]), torch.ones(1, 3)
    function = rollout_corr_helper.compute_rollout_correction_weights
    theirs = function(log_ratios, mask, "sequence", 2.0)[0]
    ours = importance_weights(log_ratios, mask.bool(), "sequence-truncate", (0.0, 2.0))
    line("verl", WEIGHTS, "importance_weights 'sequence-truncate'", "ratios above e^20").agree(
        ours, theirs
    )


@for_cases()
def test_rejected_sequences_and_tokens(case):
    """verl bounds the sampler's ratio to the policy, we that of the policy to the sampler."""
    low, high = case.draw.choice((0.2, 0.5, 0.9)), case.draw.choice((1.1, 2.0, 5.0))
    log_ratios = case.normal(case.draw.choice((0.05, 0.5, 3)))
    for option, kind in (("seq_mean_k1", "sequence-mask"), ("token_k1", "mask")):
        mask = rollout_corr_helper.compute_rollout_rejection_mask(
            log_ratios, case.floats, option, f"{1 / high}_{1 / low}"
        )[0]
        ours = importance_weights(log_ratios, case.mask, kind, (low, high))
        where = line("verl", REJECTED, f"importance_weights {kind!r}", option)
        where.agree(ours, log_ratios.exp() * mask)


@for_cases()
def test_mismatch_metrics(case):
    old = case.logprobs()
    sampler = case.near(old)
    ours = mismatch_metrics(old - sampler, case.mask)
    theirs = rollout_corr_helper.compute_offpolicy_metrics(old, sampler, case.floats)
    for name, other in (("sampling_kl", "kl"), ("sampling_kl_k3", "k3_kl")):
        line("verl", "compute_offpolicy_metrics", "mismatch_metrics", "kl, k3_kl").agree(
            torch.tensor(ours[name], dtype=torch.float32),
            torch.tensor(theirs[other], dtype=torch.float32),
            scale=float(sampler.abs().amax()),
        )
    _, metrics = rollout_corr_helper.compute_rollout_correction_weights(
        old - sampler, case.floats, "token", math.exp(20)
    )
    line("verl", "compute_is_metrics", "mismatch_metrics", "effective sample size").agree(
        torch.tensor(ours["effective_sample_size"], dtype=torch.float32),
        torch.tensor(metrics["rollout_is_eff_sample_size"], dtype=torch.float32),
        scale=1.0,
    )
