"""Rollout -> Experience: reference log-probs, values, token rewards, advantages, returns."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ppo_fast.config import PPOConfig
from ppo_fast.critics.critic import Critic, batch_baseline
from ppo_fast.data.tokens import Tokens, batches_by_tokens
from ppo_fast.models.language_model import LanguageModel, logprobs_of_both
from ppo_fast.models.precision import uses_tf32
from ppo_fast.models.trunk import TrunkStates
from ppo_fast.ops import gae, kl_estimate, whiten
from ppo_fast.rollout import Rollout


@dataclass(frozen=True)
class Experience:
    """What the update reads. Legend: B sequences, P prompt and T response tokens, D hidden size.
    Everything [B, T] is float32 and 0 beyond a response.

    tokens: the ids and their masks.
    temperature: divides logits in every log-prob.
    old_logprobs, ref_logprobs: [B, T], of the policy that sampled and of the reference.
    values: [B, T], of the state before each token, by the old value function.
    scores: [B], one a sequence, before KL.
    rewards: [B, T]: the score on the last token, less the KL penalty where it is in the reward.
    advantages: [B, T], as the update uses them (whitened where the config says so).
    returns: [B, T], the value function's targets, from unwhitened advantages.
    trunk: the frozen trunk's activations; None without a trunk.
    metrics: plain numbers for the log.
    """

    tokens: Tokens
    temperature: float
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    trunk: TrunkStates | None
    metrics: dict[str, float]


@torch.no_grad()
def make_experience(
    rollout: Rollout,
    scores: Tensor,
    *,
    policy: LanguageModel,
    reference: LanguageModel,
    critic: Critic | None,
    config: PPOConfig,
) -> Experience:
    """Score a rollout token by token.

    Args:
        rollout: what was sampled.
        scores: [B] float32, one a sequence.
        policy: as it was when it sampled.
        reference: the frozen model that the KL is measured to.
        critic: the value function; None: the batch's mean of the other sequences.
        config: KL, gamma, lambda, whitening.
    """
    tokens, mask = rollout.tokens, rollout.tokens.response_mask
    if critic is None and len(tokens) == 1:
        warnings.warn(
            "critic='baseline' with a batch of one: there is no other sequence to compare with, so "
            "that nothing is learned from its score; use a larger batch or critic='head'",
            stacklevel=3,
        )
    temperature, budget = rollout.sampling.temperature, config.forward_batch_tokens
    trunk = with_trunk(rollout, policy, budget).trunk
    if trunk is not None and config.trunk_dtype is not None:
        trunk = trunk.to(torch.bfloat16)

    def reference_logprobs(part: Tokens, below: Tensor | None) -> Tensor:
        forward = reference.forward(part, below)
        return reference.logprobs(forward, part, temperature=temperature).logprobs

    def logprobs_of_policy_and_reference(part: Tokens, below: Tensor | None) -> Tensor:
        return logprobs_of_both(policy, reference, part, below, temperature=temperature)

    # another engine, a truncated sampler, autocast, TF32 or a rounded trunk: what was drawn is not
    # what the update will compute
    old = rollout.logprobs
    known = config.trunk_dtype is None and computes_in_float32(policy)
    if old is None or rollout.sampling.truncates or not known:
        old, ref = in_batches(logprobs_of_policy_and_reference, tokens, trunk, budget)
    else:
        ref = in_batches(reference_logprobs, tokens, trunk, budget)
    rewards = token_rewards(scores, old, ref, tokens, config)
    if critic is None:
        values = batch_baseline(scores, tokens, config.gamma)
    elif critic.reads_states and rollout.states is not None:
        values = critic.values(tokens, rollout.states)
    elif critic.reads_states:
        values = in_batches(
            lambda part, below: critic.values(part, policy.forward(part, below).states),
            tokens,
            trunk,
            budget,
        )
    else:
        values = in_batches(
            lambda part, below: critic.values(part, trunk=below), tokens, trunk, budget
        )
    if not torch.isfinite(values).all():
        raise ValueError("value_model: returned NaN or infinity; values must be finite")
    # a baseline says nothing of later states: lambda 1 never bootstraps from it
    lam = 1.0 if critic is None else config.gae_lambda
    advantages, returns = gae(rewards, values.float(), mask=mask, gamma=config.gamma, lam=lam)
    metrics = experience_metrics(rollout, scores, old, ref, advantages)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask=mask)
    return Experience(
        tokens, temperature, old, ref, values.float(), scores, rewards, advantages, returns, trunk,
        metrics,
    )  # fmt: skip


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, tokens: Tokens, config: PPOConfig
) -> Tensor:
    """[B, T]: the sequence's score on its last token and, with ``kl_in="reward"``, minus
    ``kl_penalty`` times the KL estimate on every token (Ouyang et al. 2022, eq. 2)."""
    rewards = torch.zeros_like(logprobs)
    if config.kl_in == "reward" and config.kl_penalty > 0:
        kl = kl_estimate(
            logprobs, ref_logprobs, mask=tokens.response_mask, estimator=config.estimator()
        )
        rewards = -config.kl_penalty * kl
    last = (tokens.response_lengths - 1).to(tokens.device)
    return rewards.scatter_add(1, last[:, None], scores.to(rewards)[:, None])


def with_trunk(
    rollout: Rollout, policy: LanguageModel, budget: int, *, whole: bool = False
) -> Rollout:
    """``rollout`` with the activations of the policy's trunk, if it has one: as they were decoded
    or, where they were not, or not ``whole``, from one pass."""
    trunk = rollout.trunk
    if policy.split is None or (trunk is not None and (trunk.whole or not whole)):
        return rollout
    return replace(rollout, trunk=trunk_states(policy, rollout.tokens, budget))


def trunk_states(policy: LanguageModel, tokens: Tokens, budget: int) -> TrunkStates:
    """The frozen trunk's activations of every token."""
    parts: list[Tensor] = []
    rows = torch.empty(0, dtype=torch.int64, device="cpu")
    for batch in batches_by_tokens(tokens.lengths, budget):
        part = tokens.select(batch)
        parts.append(TrunkStates.pack(policy.trunk(part), part, whole=True).states)
        rows = torch.cat([rows, batch])
    lengths = tokens.lengths[rows]
    first = torch.empty_like(lengths)
    first[rows] = lengths.cumsum(0) - lengths
    return TrunkStates(torch.cat(parts), first, whole=True)


def in_batches(
    compute: Callable[[Tokens, Tensor | None], Tensor],
    tokens: Tokens,
    trunk: TrunkStates | None,
    budget: int,
) -> Tensor:
    """``compute`` on batches of at most ``budget`` tokens, [..., b, t] each, put together as
    [..., B, T] float32."""
    out = torch.empty(0, device="cpu")
    for rows in batches_by_tokens(tokens.lengths, budget):
        part = compute(tokens.select(rows), select_trunk(trunk, tokens, rows)).float()
        if not out.numel():
            out = part.new_zeros(*part.shape[:-2], *tokens.response_ids.shape)
        out[..., rows.to(tokens.device), : part.shape[-1]] = part
    return out


def select_trunk(trunk: TrunkStates | None, tokens: Tokens, rows: Tensor) -> Tensor | None:
    """The trunk's activations for ``tokens.select(rows)``."""
    return None if trunk is None else trunk.select(tokens, rows)


def computes_in_float32(policy: LanguageModel) -> bool:
    """Whether decoding and the update compute in full float32, hence agree to rounding."""
    weight = next(policy.model.parameters())
    return (
        weight.dtype in (torch.float32, torch.float64)
        and policy.compute_dtype is None
        and not torch.is_autocast_enabled(weight.device.type)
        and not uses_tf32(weight.device)
    )


def experience_metrics(
    rollout: Rollout, scores: Tensor, old: Tensor, ref: Tensor, advantages: Tensor
) -> dict[str, float]:
    """What the log says of a batch before the update: means over valid tokens or sequences."""
    lengths = rollout.tokens.response_lengths
    count = float(lengths.sum())
    kl = float((old - ref).sum())
    return {
        "mean_reward": float(scores.mean()),
        "reward_std": float(scores.std(correction=0)),
        "kl_divergence": kl / count,
        "kl_sequence": kl / len(lengths),
        # without truncation tokens are drawn from softmax(x / t): minus their mean log-prob
        # estimates its entropy
        "entropy": -float(old.sum()) / count,
        "mean_advantage": float(advantages.sum()) / count,
        "response_length": count / len(lengths),
        "finished_fraction": float(rollout.finished.float().mean()),
    }
