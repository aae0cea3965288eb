"""Advantages, rewards, KL estimates and value loss: ours against OpenRLHF's."""

from __future__ import annotations

import pytest
import torch
from oracles import openrlhf_side as openrlhf
from oracles.cases import for_cases, with_gradients
from oracles.ledger import line, loss_and_gradients_agree
from oracles.openrlhf_side import RemoteExperienceMaker
from oracles.ours import advantages_of

from ppo_fast.config import PPOConfig
from ppo_fast.learning.coefficients import adapted_kl
from ppo_fast.learning.make_experience import less_kl
from ppo_fast.ops import gae, kl_estimate, value_loss, whiten
from ppo_fast.rewards.shaping import EPSILON, length_penalty, place_scores, shape_rewards

# OpenRLHF takes actions from the first to the last; all of our masks but those with holes.
NO_HOLES = ("full", "padded")


@for_cases(masks=NO_HOLES)
def test_gae(case):
    where = line("OpenRLHF", "get_advantages_and_returns", "gae", "advantages, returns")
    gamma, lam = case.draw.choice((1.0, 0.99, 0.5)), case.draw.choice((1.0, 0.95, 0.3, 0.0))
    rewards, values = case.normal(), case.normal()
    ours = gae(rewards, values, mask=case.mask, gamma=gamma, lam=lam, impl=case.impl)
    found = RemoteExperienceMaker.get_advantages_and_returns(
        None, values, rewards, case.floats, gamma, lam
    )
    for mine, other in zip(ours, found, strict=True):
        where.agree(mine, other, scale=values.abs().amax())


@for_cases(masks=("full",))
def test_gae_at_holes(case):
    """Where a tool's output is masked, OpenRLHF takes its values for 0; ours are carried over."""
    where = line(
        "OpenRLHF",
        "get_advantages_and_returns",
        "gae",
        "holes",
        "a masked token inside a response has value 0 and discounts; ours is skipped, as verl's is",
    )
    if case.steps < 3:
        return
    case.mask[:, case.draw.randint(1, case.steps - 2)] = False
    rewards, values = case.normal(), case.normal()
    ours = gae(rewards, values, mask=case.mask, gamma=0.9, lam=0.9, impl=case.impl)
    found = RemoteExperienceMaker.get_advantages_and_returns(
        None, values, rewards, case.floats, 0.9, 0.9
    )
    zeros = [x * case.floats for x in (rewards, values)]
    read = gae(*zeros, gamma=0.9, lam=0.9, impl=case.impl)
    where.agree(read.advantages, found[0], scale=values.abs().amax())
    where.differ(ours.advantages, found[0] * case.floats, by=0.0)


@for_cases(masks=NO_HOLES)
def test_cumulative_returns(case):
    where = line("OpenRLHF", "get_cumulative_returns", "gae, values 0", "REINFORCE")
    gamma, rewards = case.draw.choice((1.0, 0.99, 0.5)), case.normal()
    zeros = torch.zeros_like(rewards)
    ours = gae(rewards, zeros, mask=case.mask, gamma=gamma, lam=1.0, impl=case.impl)
    found = RemoteExperienceMaker.get_cumulative_returns(None, rewards, case.floats, gamma)
    where.agree(ours.returns, found, scale=rewards.abs().sum(1).amax())


@for_cases(masks=NO_HOLES)
def test_compute_reward(case):
    where = line(
        "OpenRLHF", "compute_reward", "place_scores, less_kl", "k1, k2; scores clipped or not"
    )
    kl_coef, clip = case.draw.choice((0.0, 0.05)), case.draw.choice((None, 0.5))
    estimator = case.draw.choice(("k1", "k2"))
    old, scores = case.logprobs(), case.normal(of_rows=True)
    ref = case.near(old)
    config = PPOConfig(kl_estimator=estimator, kl_penalty=kl_coef, reward_clip=clip)
    tokens = case.tokens()
    finished = torch.ones(case.rows, dtype=torch.bool)
    shaped, _ = shape_rewards(place_scores(scores, tokens), tokens, finished, config)
    ours = less_kl(shaped, old, ref, case.mask, kl_coef, config)
    kl = openrlhf.utils.compute_approx_kl(old, ref, kl_estimator=estimator) * case.mask
    bounds = None if clip is None else (-clip, clip)
    found = openrlhf.utils.compute_reward(scores, kl_coef, kl, case.mask, bounds)
    if float((old - ref).abs().amax()) < 4:  # beyond it clamps
        where.agree(ours.float(), found, scale=ref.abs().amax() ** 2)


@pytest.mark.parametrize(
    ("estimator", "ours", "unbiased"),
    [("k1", "k1", False), ("k2", "k2", False), ("k3", "k3", False), ("k1", "k1+k2", True)],
)
@for_cases()
def test_approx_kl(case, estimator, ours, unbiased):
    logprobs, upstream = case.logprobs().float(), case.normal().float()
    ref = logprobs + case.normal().float().clamp(-4, 4)
    value, gradient = with_gradients(
        lambda x: kl_estimate(x, ref, estimator=ours, clamp=True, impl=case.impl),
        logprobs,
        upstream=upstream,
    )
    settings = {"kl_estimator": estimator, "unbiased_gradient": unbiased}
    found, other = with_gradients(
        lambda x: openrlhf.utils.compute_approx_kl(x, ref, **settings), logprobs, upstream=upstream
    )
    options = estimator + (", unbiased gradient" if unbiased else "")
    where = line("OpenRLHF", "compute_approx_kl", f"kl_estimate {ours}", options)
    scale = logprobs.abs().amax().clamp_min(1)  # k3 is a sum of three terms
    where.agree(value, found, scale=scale)
    where.agree(gradient, other, scale=scale * upstream.abs().amax())


def test_approx_kl_is_clamped():
    """All of OpenRLHF's estimators are clamped to 10 nats; of ours k3 is, as verl's."""
    where = line(
        "OpenRLHF",
        "compute_approx_kl",
        "kl_estimate",
        "far off",
        "k1 and k2 are clamped to 10 nats, with gradient 0 beyond; ours and verl's are not",
    )
    logprobs, ref = torch.tensor([[-5.0, -25.0]]), torch.tensor([[-30.0, 0.0]])
    differences = logprobs - ref
    for estimator, value in (("k1", differences), ("k2", differences**2 / 2)):
        found, gradient = with_gradients(
            lambda x, name=estimator: openrlhf.utils.compute_approx_kl(x, ref, kl_estimator=name),
            logprobs,
            upstream=torch.ones(1, 2),
        )
        where.agree(found, value.clamp(-10, 10))
        where.agree(gradient, torch.zeros(1, 2))
        where.agree(kl_estimate(logprobs, ref, estimator=estimator), value)


@for_cases()
def test_value_loss(case):
    clip, tokens = case.draw.choice((None, 0.05, 0.2)), case.draw.choice((None, 50))
    values, returns = case.normal(), case.normal()
    old = values + case.normal(case.draw.choice((0.01, 0.3, 1.0)))
    loss = openrlhf.ValueLoss(clip)
    settings = {"mask": case.mask, "clip": clip, "normalizer": tokens, "impl": case.impl}

    def ours(x):
        return value_loss(x, old_values=old, returns=returns, **settings).loss

    options = "clipped" if clip else "squared"
    options += ", tokens of the step" if tokens else ""
    loss_and_gradients_agree(
        line("OpenRLHF", "ValueLoss", "value_loss", options),
        with_gradients(ours, values),
        with_gradients(
            lambda x: loss(x, old, returns, case.floats, batch_num_tokens=tokens), values
        ),
    )


@pytest.mark.parametrize(
    ("estimator", "ours"),
    [
        ("rloo", "baseline"),
        ("dr_grpo", "group_mean"),
        ("group_norm", "group_norm"),
        ("flash_reinforce", "batch_mean"),
    ],
)
@for_cases()
def test_advantages_of_groups(case, estimator, ours):
    """The KL is in the rewards of tokens, as ours, and not in the baseline."""
    samples, kl_coef = case.make_groups(), case.draw.choice((0.0, 0.05))
    scores, tokens, kl = case.normal(of_rows=True), case.tokens(), case.normal() * case.floats
    found = openrlhf.experience(
        estimator, scores, kl, case.floats, samples_per_prompt=samples, kl_coef=kl_coef
    ).advantages
    rewards = place_scores(scores, tokens)
    mine = advantages_of(ours, rewards, tokens, samples, kl=kl_coef * kl)
    scale = scores.abs().amax() + kl.abs().sum(1).amax()
    note = ""
    if estimator == "group_norm":
        note = "group_norm adds 1e-9 to the standard deviation of a group, ours 1e-4"
        deviation = scores.view(-1, samples).std(1).repeat_interleave(samples)[:, None]
        of_scores = advantages_of(ours, rewards, tokens, samples)
        mine = mine - of_scores + of_scores * (deviation + EPSILON) / (deviation + 1e-9)
        scale = scale * (1 + 1 / deviation.amin())
    line("OpenRLHF", "compute_advantages_and_returns", ours, estimator, note).agree(
        mine, found, scale=scale
    )


@pytest.mark.parametrize("estimator", ["gae", "reinforce_baseline"])
@for_cases()
def test_whitened_advantages(case, estimator):
    """OpenRLHF divides by the biased deviation, of n; ours, as verl's, is of n - 1."""
    samples = case.make_groups()
    scores, values, tokens = case.normal(of_rows=True), case.normal(), case.tokens()
    found = openrlhf.experience(
        estimator,
        scores,
        torch.zeros_like(values),
        case.floats,
        samples_per_prompt=samples,
        values=values,
        lam=0.95,
    ).advantages
    rewards = place_scores(scores, tokens)
    if estimator == "gae":
        plain = gae(rewards, values, mask=case.mask, gamma=1.0, lam=0.95, impl=case.impl).advantages
    else:
        plain = advantages_of("group_mean", rewards, tokens, samples)
    count, valid = int(case.mask.sum()), plain[case.mask]
    biased = whiten(plain, mask=case.mask, impl=case.impl) * (count / (count - 1)) ** 0.5
    line(
        "OpenRLHF",
        "compute_advantages_and_returns",
        "whiten",
        estimator,
        f"whitening ({estimator}) is by the variance of n, ours by that of n - 1",
    ).agree(  # it computes in float32
        biased[case.mask].float(),
        found[case.mask].float(),
        scale=1 + (scores.abs().amax() + valid.abs().amax()) / valid.std(),
        slack=1e-7,  # ours adds 1e-8 to the variance, it takes 1e-8 as the smallest
    )


@for_cases()
def test_length_penalty(case):
    where = line("OpenRLHF", "apply_overlong_penalty", "length_penalty", "DAPO")
    longest = case.draw.randint(2, 40)
    buffer = case.draw.randint(1, longest)
    penalty = case.draw.choice((0.5, 1.0))
    lengths = torch.tensor([case.draw.randint(1, longest) for _ in range(case.rows)])
    config = PPOConfig(overlong_buffer=buffer, overlong_penalty=penalty, max_length=longest)
    ours = -length_penalty(lengths, longest, config)
    where.agree(ours, openrlhf.overlong_penalty(lengths, longest, buffer, penalty))


@for_cases(60)
def test_adaptive_kl(case):
    where = line("OpenRLHF", "AdaptiveKLController", "adapted_kl", "runs of ten steps")
    target, horizon = case.draw.uniform(1, 10), case.draw.choice((100, 10_000))
    other = openrlhf.AdaptiveKLController(0.2, target, horizon)
    ours = 0.2
    for _ in range(10):
        kl, count = case.draw.uniform(0, 20), case.draw.randint(1, 64)
        other.update(kl, count)
        ours = adapted_kl(ours, kl, target, count / horizon)
    where.agree(torch.tensor(ours).double(), torch.tensor(float(other.value)).double())
