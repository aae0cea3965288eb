"""Make Experience of a rollout: reference log-probs, values, token rewards, advantages, returns."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from ppo_fast.config import PPOConfig
from ppo_fast.critics.critic import Critic
from ppo_fast.data.batches import batches_by_tokens, in_batches
from ppo_fast.data.experience import Experience
from ppo_fast.data.rollout import Rollout
from ppo_fast.data.tokens import Tokens
from ppo_fast.data.trunk_states import TrunkStates
from ppo_fast.models.language_model import LanguageModel, logprobs_of_both
from ppo_fast.models.precision import uses_tf32
from ppo_fast.ops import gae, kl_estimate, whiten

# Bounds of a first minibatch's log-ratios, far above rounding: in float32, between decoding with a
# cache and one pass over all tokens; in half precision, between two passes whose batches differ
# (0.07 was seen on an H200).
MOST_FIRST_LOG_RATIO = 1e-2
MOST_FIRST_LOG_RATIO_HALF = 0.3
# Bound of the mean difference between log-probs of decoding and of the update in half precision.
MOST_MEAN_DIFFERENCE_HALF = 0.15


@torch.no_grad()
def make_experience(
    rollout: Rollout,
    scores: Tensor,
    *,
    policy: LanguageModel,
    reference: LanguageModel,
    critic: Critic,
    config: PPOConfig,
) -> Experience:
    """Compute rewards, values, advantages and returns of a rollout, token by token.

    Args:
        rollout: the sampled responses.
        scores: [B] float32, one per sequence.
        policy: as it was when it sampled.
        reference: the frozen model that the KL is measured to.
        critic: estimates values.
        config: KL, gamma, lambda, whitening.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    tokens, mask = rollout.tokens, rollout.tokens.response_mask
    temperature, max_tokens = rollout.sampling.temperature, config.forward_batch_tokens
    rollout = with_trunk(rollout, policy, max_tokens)
    trunk_states = rollout.trunk_states
    if trunk_states is not None and config.trunk_dtype is not None:
        trunk_states = trunk_states.to(torch.bfloat16)
        rollout = replace(rollout, trunk_states=trunk_states)

    def reference_logprobs(part: Tokens, states: Tensor | None) -> Tensor:
        forward = reference.forward(part, states)
        return reference.logprobs(forward, part, temperature=temperature).logprobs

    def logprobs_of_policy_and_reference(part: Tokens, states: Tensor | None) -> Tensor:
        return logprobs_of_both(policy, reference, part, states, temperature=temperature)

    # with another engine, truncated sampling, autocast, TF32 or rounded trunk states, the log-probs
    # of the rollout are not those that the update will compute
    old = rollout.logprobs
    known = config.trunk_dtype is None and computes_in_float32(policy)
    if old is None or rollout.sampling.truncates or not known:
        old, ref = in_batches(logprobs_of_policy_and_reference, tokens, trunk_states, max_tokens)
    else:
        ref = in_batches(reference_logprobs, tokens, trunk_states, max_tokens)
    rewards = token_rewards(scores, old, ref, tokens, config)
    values = critic.values_of_rollout(rollout, scores, policy, max_tokens)
    if not torch.isfinite(values).all():
        raise ValueError("value_model: returned NaN or infinity; values must be finite")
    lam = config.gae_lambda if critic.bootstraps else 1.0
    advantages, returns = gae(rewards, values.float(), mask=mask, gamma=config.gamma, lam=lam)
    metrics = experience_metrics(rollout, scores, old, ref, advantages)
    if rollout.logprobs is not None and old is not rollout.logprobs:
        metrics |= sampling_differences(rollout.logprobs, old, mask)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask=mask)
    return Experience(
        tokens, temperature, old, ref, values.float(), scores, rewards, advantages, returns,
        trunk_states, metrics,
    )  # fmt: skip


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, tokens: Tokens, config: PPOConfig
) -> Tensor:
    """Compute the rewards [B, T]: each sequence's score on its last token, less the KL penalty.

    With ``kl_in="reward"``, the penalty on every token is ``kl_penalty`` times the KL estimate
    (Ouyang et al. 2022, eq. 2); otherwise it is 0.
    """
    rewards = torch.zeros_like(logprobs)
    if config.kl_in == "reward" and config.kl_penalty > 0:
        kl = kl_estimate(
            logprobs,
            ref_logprobs,
            mask=tokens.response_mask,
            estimator=config.estimator(),
            clamp=True,
        )
        rewards = -config.kl_penalty * kl
    last = (tokens.response_lengths - 1).to(tokens.device)
    return rewards.scatter_add(1, last[:, None], scores.to(rewards)[:, None])


def computes_in_float32(policy: LanguageModel) -> bool:
    """Return whether decoding and the update compute in full float32 or float64.

    If so, their log-probs agree to rounding.
    """
    weight = next(policy.model.parameters())
    return (
        weight.dtype in (torch.float32, torch.float64)
        and policy.compute_dtype is None
        and policy.own_autocast is None
        and not torch.is_autocast_enabled(weight.device.type)
        and not uses_tf32(weight.device)
    )


def sampling_differences(sampled: Tensor, old: Tensor, mask: Tensor) -> dict[str, float]:
    """Return the mean and max |difference| of the log-probs of decoding and of the update."""
    differences = (sampled - old)[mask].abs()
    return {
        "sampling_logprob_difference": float(differences.mean()),
        "sampling_logprob_difference_max": float(differences.max()),
    }


def warn_of_disagreement(
    policy: LanguageModel, config: PPOConfig, metrics: dict[str, float]
) -> None:
    """Warn where decoding and the update differ by more than rounding explains.

    In a step's first minibatch all ratios are 1 but for rounding. Where the update does not take
    the log-probs of decoding, this holds whatever decoding computed, which is compared apart.
    """
    full = computes_in_float32(policy)
    ratio = metrics["first_max_log_ratio"]
    mean = metrics.get("sampling_logprob_difference", 0.0)
    largest = metrics.get("sampling_logprob_difference_max", 0.0)
    if ratio > (MOST_FIRST_LOG_RATIO if full else MOST_FIRST_LOG_RATIO_HALF):
        found = f"the first minibatch's ratios are not 1: exp({ratio:.2g}) at most"
    elif full and config.trunk_dtype is None and largest > MOST_FIRST_LOG_RATIO:
        found = f"log-probs of decoding and of the update differ by up to {largest:.2g}"
    elif mean > MOST_MEAN_DIFFERENCE_HALF:
        found = f"log-probs of decoding and of the update differ by {mean:.2g} in the mean"
    else:
        return
    warnings.warn(
        f"{found}. Decoding and the update compute {type(policy.model).__name__} differently, so "
        "the training results are unreliable",
        stacklevel=3,
    )


def experience_metrics(
    rollout: Rollout, scores: Tensor, old: Tensor, ref: Tensor, advantages: Tensor
) -> dict[str, float]:
    """Return a batch's metrics before the update: means over valid tokens or sequences."""
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


def with_trunk(
    rollout: Rollout, policy: LanguageModel, max_tokens: int, *, whole: bool = False
) -> Rollout:
    """Return ``rollout`` with the policy's trunk states, if the policy has a trunk.

    Decoding's trunk states are kept. If there are none, or they lack last tokens and ``whole`` asks
    for them, passes of at most ``max_tokens`` tokens compute them.
    """
    trunk_states = rollout.trunk_states
    if policy.split is None or (trunk_states is not None and (trunk_states.whole or not whole)):
        return rollout
    return replace(
        rollout, trunk_states=trunk_states_in_batches(policy, rollout.tokens, max_tokens)
    )


def trunk_states_in_batches(policy: LanguageModel, tokens: Tokens, max_tokens: int) -> TrunkStates:
    """Compute the trunk states of every token, in passes of at most ``max_tokens`` tokens."""
    parts: list[Tensor] = []
    rows = torch.empty(0, dtype=torch.int64, device="cpu")
    for batch in batches_by_tokens(tokens.lengths, max_tokens):
        part = tokens.select(batch)
        parts.append(TrunkStates.pack(policy.compute_trunk_states(part), part, whole=True).states)
        rows = torch.cat([rows, batch])
    lengths = tokens.lengths[rows]
    first = torch.empty_like(lengths)
    first[rows] = lengths.cumsum(0) - lengths
    return TrunkStates(torch.cat(parts), first, whole=True)
