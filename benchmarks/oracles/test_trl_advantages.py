"""Advantages, tokens of high entropy, the adaptive entropy bonus: ours against TRL's."""

from __future__ import annotations

import math

import torch
from oracles import trl_side as trl
from oracles.cases import for_cases
from oracles.ledger import line
from oracles.ours import advantages_of

from ppo_fast.config import PPOConfig
from ppo_fast.learning.coefficients import adapted_bonus
from ppo_fast.learning.importance import highest, importance_weights
from ppo_fast.learning.make_experience import less_kl
from ppo_fast.rewards.shaping import place_scores, shape_rewards


@for_cases()
def test_advantages(case):
    samples = case.make_groups()
    scores, tokens = case.normal(of_rows=True), case.tokens()
    rewards = place_scores(scores, tokens)
    spread = scores.view(-1, samples).std(1).amin()
    for scale_rewards, mine in (("group", "group_norm"), ("none", "group_mean")):
        found = trl.grpo_advantages(scores, samples, scale_rewards)
        ours = advantages_of(mine, rewards, tokens, samples)
        where = line("TRL", "GRPOTrainer", mine, f"scale_rewards={scale_rewards!r}")
        scale = scores.abs().amax() * (1 + 1 / spread)
        # Its standard deviation has n / (n - 1) in float32.
        where.agree(ours[:, 0].float(), found.float(), scale=scale)


@for_cases()
def test_rloo_advantages(case):
    """TRL takes the KL of a sequence from its score; ours has it token by token in the return.

    The first token's advantage has all of it; the baseline is that of the scores alone in ours.
    """
    samples, beta = case.make_groups(), case.draw.choice((0.0, 0.05))
    clip = case.draw.choice((None, 0.5))
    scores, tokens, old = case.normal(of_rows=True), case.tokens(), case.logprobs()
    ref = old + case.normal(0.3)
    found = trl.rloo_advantages(
        scores,
        samples,
        logprobs=old,
        ref_logprobs=ref,
        mask=case.floats,
        beta=beta,
        clip=None if clip is None else (-clip, clip),
    )
    config = PPOConfig(reward_clip=clip, kl_penalty=beta)
    finished = torch.ones(case.rows, dtype=torch.bool)
    shaped, _ = shape_rewards(place_scores(scores, tokens), tokens, finished, config)
    kl = shaped - less_kl(shaped, old, ref, case.mask, beta, config)
    ours = advantages_of("baseline", shaped, tokens, samples, kl=kl)[:, 0]
    scale = scores.abs().amax() + ref.abs().sum(1).amax()
    options = "scores clipped" if clip else "scores"
    if beta == 0:
        line("TRL", "RLOOTrainer", "baseline", options).agree(ours, found, scale=scale)
        return
    of_rows = kl.sum(1).view(-1, samples)
    of_others = ((of_rows.sum(1, keepdim=True) - of_rows) / (samples - 1)).flatten()
    line(
        "TRL",
        "RLOOTrainer",
        "baseline",
        options + ", KL in the reward",
        "the baseline has the other samples' KL in it, and all tokens a sequence's whole KL; "
        "ours is a baseline of scores, and a token's return has the KL from there on",
    ).agree(ours, found - of_others, scale=scale)


@for_cases()
def test_tokens_of_high_entropy(case):
    """TRL interpolates the quantile: it takes the share of n - 1 tokens, and one more."""
    same = line("TRL", "get_high_entropy_mask", "highest", "the same number of tokens")
    one = line(
        "TRL",
        "get_high_entropy_mask",
        "highest",
        "another number",
        "of n tokens, 1 + floor(share * (n - 1)) are chosen by an interpolated quantile; ours are "
        "round(share * n), at least 1: one more or less",
    )
    share, entropy = case.draw.choice((0.1, 0.2, 0.5, 0.8)), case.normal().abs().float()
    stub = trl.grpo(clip=(0.2, 0.2))
    found = stub.get_high_entropy_mask(entropy, case.mask.float(), 1 - share)
    ours = highest(entropy, case.mask, share)
    number = int(case.mask.sum())
    # 1e-6: a product that is whole but for rounding.
    assert int(found.sum()) in {
        1 + math.floor(share * (number - 1) + error) for error in (-1e-6, 1e-6)
    }
    if ours.sum() == found.sum():
        same.agree(ours.double(), found.double())
    else:
        assert abs(int(ours.sum()) - int(found.sum())) == 1
        assert not (ours & ~found).any() or not (found & ~ours).any()
        one.differ(ours.double(), found.double())


@for_cases()
def test_importance_weights(case):
    low, high = case.draw.choice(((None, 2.0), (0.5, 5.0), (0.9, 1.1)))
    sampler = case.logprobs()
    old = case.near(sampler)
    for mode, kind in (
        ("token_truncate", "truncate"),
        ("token_mask", "mask"),
        ("sequence_truncate", "sequence-truncate"),
    ):
        found = trl.importance_weights(mode, old, sampler, case.floats, (low, high))
        where = line("TRL", "GRPOTrainer", f"importance_weights {kind!r}", mode)
        where.agree(
            importance_weights(old - sampler, case.mask, kind, (low or 0.0, high)),
            found * case.floats,  # exp of a sum has the sum's rounding as its relative error
            scale=high * (old - sampler).abs().sum(1).amax().clamp_min(1),
        )


@for_cases()
def test_adaptive_entropy(case):
    where = line("TRL", "GRPOTrainer._compute_loss", "adapted_bonus", "adaptive entropy bonus")
    target, change = case.draw.uniform(0.2, 1.5), case.draw.choice((0.005, 0.01))
    weight = case.draw.choice((0.0, 0.002, 0.1))
    stub = trl.grpo(
        clip=(0.2, 0.2),
        entropy_coef=weight,
        entropy_target=target,
        entropy_coef_delta=change,
        use_adaptive_entropy=True,
        _entropy_bonus_enabled=True,
        _last_world_entropy=0.0,
    )
    entropy, logprobs = case.normal().abs(), case.logprobs()
    advantages = case.normal(of_rows=True)
    trl.grpo_loss(stub, logprobs, entropy, case.floats, advantages=advantages)
    mean = float(entropy[case.mask].double().mean())
    ours = adapted_bonus(weight, mean, target, change)
    where.agree(torch.tensor(ours).double(), torch.tensor(stub.entropy_coef).double())
