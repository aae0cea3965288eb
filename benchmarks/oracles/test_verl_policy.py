"""Policy losses: ours against verl's, with all of its ways to aggregate tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles.cases import Case, for_cases, with_gradients
from oracles.ledger import EPSILON_OF_MEANS, line, loss_and_gradients_agree
from oracles.ours import policy_loss
from oracles.verl_side import actor_config, core_algos, policy_loss_of_verl
from torch import Tensor

from ppo_fast.ops import ppo_loss
from ppo_fast.ops.stats import PPO_STATS

# verl's name of an aggregation, and ours.
AGGREGATIONS = {
    "token-mean": "token-mean",
    "token-sum": "token-sum",
    "seq-mean-token-mean": "seq-mean-token-mean",
    "seq-mean-token-sum": "seq-mean-token-sum",
    "seq-mean-token-sum-norm": "seq-mean-token-sum",
}
NO_DUAL_CLIP = 1e30  # verl has always one


class Aggregation:
    """A way to aggregate, drawn for a case: for verl's config, and for our ppo_loss."""

    def __init__(self, case: Case) -> None:
        self.name = case.draw.choice(tuple(AGGREGATIONS))
        of_step = case.draw.random() < 0.5
        self.options = self.name + (", counts of the step" if of_step else "")
        ranks, tokens, rows = (2, 50, 12) if of_step else (1, None, None)
        self.info: dict[str, Any] = {}
        if of_step:
            self.info = {"dp_size": 2, "batch_num_tokens": tokens, "global_batch_size": rows}
        sequences = float(case.mask.any(1).sum()) if rows is None else rows / ranks
        normalizer: float | None = {
            "token-mean": None if tokens is None else tokens / ranks,
            "token-sum": 1 / ranks if of_step else None,
            "seq-mean-token-sum-norm": sequences * case.steps,
        }.get(self.name, sequences)
        self.ours = {"aggregation": AGGREGATIONS[self.name], "normalizer": normalizer}


def weights_or_none(case: Case) -> dict[str, Tensor]:
    """Draw importance weights, or none."""
    return {"weights": case.normal().abs()} if case.draw.random() < 0.5 else {}


@pytest.mark.parametrize("shown", ["kind", "aggregation"])
@for_cases()
def test_clipped(case, shown):
    aggregation = Aggregation(case)
    low, high = case.draw.choice((0.1, 0.2)), case.draw.choice((0.2, 0.28, 0.5))
    dual, weights = case.draw.choice((None, 1.5, 3.0)), weights_or_none(case)
    old, advantages = case.logprobs(), case.normal()
    logprobs = case.near(old)
    config = actor_config(
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=dual or NO_DUAL_CLIP,
        global_batch_info=aggregation.info,
    )
    kind = "clip-higher" + (", dual clip" if dual else "") + (", weights" if weights else "")
    options = kind if shown == "kind" else aggregation.options
    settings = {"clip": (low, high), "dual_clip": dual, **aggregation.ours, **weights}
    theirs = policy_loss_of_verl(
        "vanilla", case, advantages, old, aggregation.name, config, **weights
    )
    loss_and_gradients_agree(
        line("verl", "compute_policy_loss_vanilla", "ppo_loss", options),
        with_gradients(policy_loss(case, advantages, old, **settings), logprobs),
        with_gradients(theirs, logprobs),
        slack=EPSILON_OF_MEANS,
    )


@for_cases()
def test_metrics_of_clipped(case):
    where = line("verl", "compute_policy_loss_vanilla", "ppo_loss.metrics", "clip fractions, KL")
    old, advantages = case.logprobs(), case.normal()
    logprobs = case.near(old)
    config = actor_config(clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=2.0)
    _, theirs = core_algos.compute_policy_loss_vanilla(
        old, logprobs, advantages, case.floats, "token-mean", config
    )
    metrics = ppo_loss(
        logprobs,
        old_logprobs=old,
        advantages=advantages,
        mask=case.mask,
        clip=(0.2, 0.28),
        dual_clip=2.0,
        impl=case.impl,
    ).metrics
    sums = dict(zip(PPO_STATS, metrics.tolist(), strict=True))
    for mine, other in (
        (sums["clipped_high"] + sums["clipped_low"], "pg_clipfrac"),
        (sums["dual_clipped"], "pg_clipfrac_lower"),
        (sums["approx_kl"], "ppo_kl"),
    ):
        where.agree(
            torch.tensor(mine / sums["tokens"], dtype=torch.float32),
            torch.tensor(theirs[f"actor/{other}"], dtype=torch.float32),
            scale=float(logprobs.abs().amax()),
        )


@for_cases()
def test_with_kl_and_entropy(case):
    """The actor's whole loss: policy, KL to the reference, entropy bonus."""
    aggregation = Aggregation(case)
    estimator, of_ours = case.draw.choice(
        (("low_var_kl", "k3"), ("k1+", "k1+k2"), ("k2", "k2"), ("abs", "abs"))
    )
    kl_coef, entropy_coef = case.draw.choice((0.05, 0.5)), case.draw.choice((0.01, 0.3))
    old, advantages, entropy = case.logprobs(), case.normal(), case.normal().abs()
    ref, logprobs = case.near(old), case.near(old)
    config = actor_config(clip_ratio_c=NO_DUAL_CLIP, global_batch_info=aggregation.info)
    policy = policy_loss_of_verl("vanilla", case, advantages, old, aggregation.name, config)

    def theirs(x, h):
        kl = core_algos.kl_penalty(x, ref, estimator)
        of_kl, bonus = (
            core_algos.agg_loss(terms, case.floats, aggregation.name, **aggregation.info)
            for terms in (kl, h)
        )
        return policy(x) + kl_coef * of_kl - entropy_coef * bonus

    settings = {"ref_logprobs": ref, "kl_coef": kl_coef, "kl_estimator": of_ours}
    mine = policy_loss(
        case, advantages, old, entropy_coef=entropy_coef, **settings, **aggregation.ours
    )
    loss_and_gradients_agree(
        line("verl", "the actor's loss", "ppo_loss", f"KL {estimator}, entropy bonus"),
        with_gradients(mine, logprobs, entropy),
        with_gradients(theirs, logprobs, entropy),
        slack=EPSILON_OF_MEANS,
    )


@for_cases()
def test_gspo(case):
    """GSPO-token, since the advantages of a sequence's tokens may differ."""
    aggregation, weights = Aggregation(case), weights_or_none(case)
    low, high = case.draw.choice((3e-4, 0.1)), case.draw.choice((4e-4, 0.2))
    old, advantages = case.logprobs(), case.draw.choice((case.normal, case.same_in_rows))()
    logprobs = case.near(old)
    config = actor_config(
        clip_ratio_low=low, clip_ratio_high=high, global_batch_info=aggregation.info
    )
    theirs = policy_loss_of_verl("gspo", case, advantages, old, aggregation.name, config, **weights)
    settings = {"clip": (low, high), "ratio": "sequence", **aggregation.ours, **weights}
    options = "GSPO-token" + (", weights" if weights else "")
    loss_and_gradients_agree(
        line("verl", "compute_policy_loss_gspo", "ppo_loss ratio='sequence'", options),
        with_gradients(policy_loss(case, advantages, old, **settings), logprobs),
        with_gradients(theirs, logprobs),
        slack=EPSILON_OF_MEANS,
    )


@for_cases()
def test_cispo(case):
    aggregation, weights = Aggregation(case), weights_or_none(case)
    low, high = case.draw.choice((0.2, 0.9)), case.draw.choice((0.28, 4.0))
    old, advantages = case.logprobs(), case.normal()
    logprobs = case.near(old)
    config = actor_config(
        clip_ratio_low=low, clip_ratio_high=high, global_batch_info=aggregation.info
    )
    settings = {"clip": (low, high), "objective": "cispo", **aggregation.ours, **weights}
    theirs = policy_loss_of_verl(
        "cispo", case, advantages, old, aggregation.name, config, **weights
    )
    options = "CISPO" + (", weights" if weights else "")
    loss_and_gradients_agree(
        line("verl", "compute_policy_loss_cispo", "ppo_loss objective='cispo'", options),
        with_gradients(policy_loss(case, advantages, old, **settings), logprobs),
        with_gradients(theirs, logprobs),
        slack=EPSILON_OF_MEANS,
    )


def test_extreme_ratios():
    """verl clamps log-ratios to 20, with gradient 0 beyond; ours are not."""
    case = Case("extreme ratios", masks=("full",))
    case.rows = case.steps = 1
    case.mask, case.dtype = torch.ones(1, 1, dtype=torch.bool), torch.float64
    old, advantages = torch.zeros(1, 1).double(), -torch.ones(1, 1).double()
    logprobs = torch.full((1, 1), 25.0).double()
    config = actor_config(clip_ratio_c=NO_DUAL_CLIP)
    theirs = policy_loss_of_verl("vanilla", case, advantages, old, "token-mean", config)
    loss, gradient = with_gradients(theirs, logprobs)
    mine, another = with_gradients(policy_loss(case, advantages, old), logprobs)
    where = line(
        "verl",
        "compute_policy_loss_vanilla",
        "ppo_loss",
        "ratios above e^20",
        "log-ratios are clamped to 20, with gradient 0 beyond (GSPO's to 10); ours are not",
    )
    where.agree(loss, torch.tensor(20.0).double().exp())
    where.agree(gradient, torch.zeros(1, 1).double())
    where.agree(mine, logprobs[0, 0].exp())
    where.agree(another, logprobs.exp())
