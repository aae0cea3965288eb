"""Policy losses: ours against OpenRLHF's, with its corrections of the rollout's log-probs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from oracles.cases import Case, for_cases, with_gradients
from oracles.ledger import EPSILON_OF_MEANS, line, loss_and_gradients_agree
from oracles.openrlhf_side import PolicyLoss
from oracles.ours import policy_loss
from torch import Tensor

from ppo_fast.learning.importance import importance_weights


class Aggregation:
    """A way to aggregate, drawn for a case: for OpenRLHF's loss, and for our ppo_loss."""

    def __init__(self, case: Case, *, by_sequence: bool = False) -> None:
        self.by_token = not by_sequence and case.draw.random() < 0.5
        of_step = case.draw.random() < 0.5
        self.ours: dict[str, Any] = {
            "aggregation": "token-mean" if self.by_token else "seq-mean-token-mean"
        }
        self.options = self.ours["aggregation"] + (", counts of the step" if of_step else "")
        self.theirs: dict[str, Any] = {}
        if of_step:
            self.theirs = {"batch_num_tokens": 50, "global_batch_size": 12, "dp_size": 2}
            self.ours["normalizer"] = 25 if self.by_token else 6


def loss_of_openrlhf(
    loss: PolicyLoss, case: Case, advantages: Tensor, old: Tensor, sampler: Tensor, counts: dict
) -> Callable[[Tensor], Tensor]:
    """Return a PolicyLoss as a function of log-probs [B, T]."""
    return lambda x: loss(x, old, advantages, case.floats, sampler, **counts)[0]


@for_cases()
def test_clipped(case):
    low, high = case.draw.choice((0.1, 0.2)), case.draw.choice((0.2, 0.28, 0.5))
    dual, aggregation = case.draw.choice((None, 1.5, 3.0)), Aggregation(case)
    old, advantages = case.logprobs(), case.normal()
    logprobs = case.near(old)
    loss = PolicyLoss(low, high, dual, aggregation.by_token)
    theirs = loss_of_openrlhf(loss, case, advantages, old, old, aggregation.theirs)
    settings = {"clip": (low, high), "dual_clip": dual, **aggregation.ours}
    options = f"{aggregation.options}; with and without dual clip"
    loss_and_gradients_agree(
        line("OpenRLHF", "PolicyLoss", "ppo_loss", options),
        with_gradients(policy_loss(case, advantages, old, **settings), logprobs),
        with_gradients(theirs, logprobs),
        slack=EPSILON_OF_MEANS,
    )


@for_cases()
def test_corrected(case):
    """Its weights: ratios of the policy before the update to the sampler, cut or masked."""
    level, mode, kind, name = case.draw.choice(
        (
            ("token", "clip", "truncate", "TIS"),
            ("token", "mask", "mask", "IcePop"),
            ("seq", "mask", "sequence-mask", "sequence mask"),
        )
    )
    bounds = case.draw.choice(((0.5, 5.0), (0.2, 2.0), (0.9, 1.1)))
    aggregation = Aggregation(case)
    sampler, advantages = case.logprobs(), case.normal()
    old = case.near(sampler)
    logprobs = case.near(old)
    loss = PolicyLoss(
        token_level_loss=aggregation.by_token,
        is_correction_level=level,
        is_correction_mode=mode,
        is_correction_threshold=bounds,
    )
    theirs = loss_of_openrlhf(loss, case, advantages, old, sampler, aggregation.theirs)
    weights = importance_weights(old - sampler, case.mask, kind, bounds)
    mine = policy_loss(case, advantages, old, weights=weights, **aggregation.ours)
    loss_and_gradients_agree(
        line("OpenRLHF", "PolicyLoss", f"ppo_loss, weights {kind!r}", name),
        with_gradients(mine, logprobs),
        with_gradients(theirs, logprobs),
        slack=EPSILON_OF_MEANS,
    )


@for_cases()
def test_gspo(case):
    clip = case.draw.choice(((3e-4, 4e-4), (0.1, 0.2)))
    aggregation = Aggregation(case, by_sequence=True)
    old, advantages = case.logprobs(), case.same_in_rows()
    sampler, logprobs = case.near(old), case.near(old)
    of_sampler = case.draw.random() < 0.5
    level = "token" if of_sampler else "off"
    loss = PolicyLoss(*clip, policy_loss_type="gspo", is_correction_level=level)
    theirs = loss_of_openrlhf(loss, case, advantages, old, sampler, aggregation.theirs)
    settings = {"clip": clip, "ratio": "sequence", **aggregation.ours}
    mine = policy_loss(case, advantages, sampler if of_sampler else old, **settings)
    loss_and_gradients_agree(
        line(
            "OpenRLHF",
            "PolicyLoss",
            "ppo_loss ratio='sequence'",
            "GSPO" + (", ratio to the sampler" if of_sampler else ""),
        ),
        with_gradients(mine, logprobs),
        with_gradients(theirs, logprobs),
        slack=EPSILON_OF_MEANS,
    )


@for_cases(masks=("full", "padded", "empty rows"))
def test_gspo_of_tokens(case):
    """Where a sequence's tokens have advantages of their own, the derivatives differ."""
    aggregation = Aggregation(case, by_sequence=True)
    old, advantages = case.logprobs(), case.normal()
    logprobs = case.near(old)
    loss = PolicyLoss(policy_loss_type="gspo")
    theirs = loss_of_openrlhf(loss, case, advantages, old, old, aggregation.theirs)
    mine = policy_loss(case, advantages, old, ratio="sequence", **aggregation.ours)
    value, gradient = with_gradients(mine, logprobs)
    # Each token of a sequence gets the mean.
    mean = gradient.sum(1, keepdim=True) / case.floats.sum(1, keepdim=True).clamp_min(1)
    found, other = with_gradients(theirs, logprobs)
    scale = gradient.abs().sum()
    where = line(
        "OpenRLHF",
        "PolicyLoss",
        "ppo_loss ratio='sequence'",
        "advantages of tokens",
        "GSPO's ratio has the derivatives of a mean over tokens, ours that of the token's own, as "
        "GSPO-token and verl; the same where a sequence has one advantage",
    )
    where.agree(value, found, scale=scale, slack=10 * EPSILON_OF_MEANS)
    where.agree(mean * case.floats, other, scale=scale, slack=EPSILON_OF_MEANS)
