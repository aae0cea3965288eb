"""Make Experience of a rollout: reference log-probs, values, token rewards, advantages, returns."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from ppo_fast.config import PPOConfig
from ppo_fast.critics.baselines import check_groups
from ppo_fast.critics.critic import Critic
from ppo_fast.data.batches import batches_of, in_batches
from ppo_fast.data.experience import Experience, Moments
from ppo_fast.data.rollout import Rollout
from ppo_fast.data.tokens import Tokens
from ppo_fast.data.trunk_states import TrunkStates, join_trunk_states
from ppo_fast.learning.importance import highest, importance_weights, mismatch_metrics
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.logprobs_of_both import logprobs_of_both
from ppo_fast.models.precision import uses_tf32
from ppo_fast.nonfinite import NotFiniteError
from ppo_fast.ops import gae, kl_estimate, whiten
from ppo_fast.rewards.shaping import NO_SCORES, normalize_groups, place_scores, shape_rewards

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
    kl_coef: float | None = None,
    moments: Moments = NO_SCORES,
) -> Experience:
    """Compute rewards, values, advantages and returns of a rollout, token by token.

    Args:
        rollout: the sampled responses.
        scores: float32 [B], one per sequence, or [B, T], one per response token. A critic without
            weights compares whole sequences: it takes the sums of these.
        policy: as it was when it sampled.
        reference: the frozen model that the KL is measured to.
        critic: estimates values.
        config: shaping of rewards, KL, gamma, lambda, whitening.
        kl_coef: coefficient of the KL to the reference; None: ``config.kl_penalty``.
        moments: of the scores before this batch.

    Raises:
        NotFiniteError: a value is NaN or infinite.
    """
    _check(rollout, config)
    max_tokens = config.forward_batch_tokens
    rollout = with_trunk(rollout, policy, max_tokens)
    if rollout.trunk_states is not None and config.trunk_dtype is not None:
        rollout = replace(rollout, trunk_states=rollout.trunk_states.to(torch.bfloat16))
    if not critic.bootstraps and scores.dim() == 2:
        scores = scores.sum(1)  # baselines compare whole responses
    placed = place_scores(scores, rollout.tokens)
    shaped, moments = shape_rewards(
        placed,
        rollout.tokens,
        rollout.finished,
        config,
        max_length=rollout.sampling.max_length,
        samples_per_prompt=rollout.samples_per_prompt,
        moments=moments,
    )
    if critic.normalizes:
        shaped = normalize_groups(shaped, rollout.tokens, rollout.samples_per_prompt)
    if config.mask_truncated and not rollout.finished.all():
        rollout = replace(rollout, tokens=rollout.tokens.without_training(~rollout.finished))
    tokens, mask = rollout.tokens, rollout.tokens.response_mask

    old, ref, computed = _old_and_reference_logprobs(rollout, policy, reference, config)
    kl_coef = config.kl_penalty if kl_coef is None else kl_coef
    rewards = less_kl(shaped, old, ref, mask, kl_coef, config)
    values = critic.values_of_rollout(rollout, shaped.sum(1), policy, max_tokens).float()
    if not torch.isfinite(values).all():
        raise NotFiniteError("value_model: returned NaN or infinity; values must be finite")
    advantages, returns = estimate_advantages(rewards, values, tokens, critic, config)
    metrics = experience_metrics(rollout, placed.sum(1), old, ref, advantages)
    metrics |= _sampling_metrics(rollout, old, config, computed=computed)
    weights, high_entropy = _weights(rollout, old, policy, config)
    drawn = rollout.sampling_logprobs
    return Experience(
        tokens=tokens,
        temperature=rollout.sampling.temperature,
        max_length=rollout.sampling.max_length,
        old_logprobs=old if config.ratio_to == "old" or drawn is None else drawn,
        ref_logprobs=ref,
        values=values,
        scores=placed.sum(1),
        rewards=rewards,
        advantages=whiten(advantages, mask=mask) if config.whiten_advantages else advantages,
        returns=returns,
        trunk_states=rollout.trunk_states,
        metrics=metrics,
        weights=weights,
        high_entropy=high_entropy,
        reward_moments=moments if config.reward_normalization == "running" else None,
    )


def _check(rollout: Rollout, config: PPOConfig) -> None:
    """Raise ValueError where a rollout lacks what the config needs."""
    if rollout.sampling_logprobs is None and _corrects(config):
        raise ValueError(
            "rollout: has no sampling_logprobs, which ratio_to='sampler' and importance need; give "
            "them to Rollout.from_tokens(..., sampling_logprobs=...)"
        )
    if config.reward_normalization == "group":
        check_groups("reward_normalization='group'", rollout)


def _corrects(config: PPOConfig) -> bool:
    """Return whether the sampler's log-probs enter the loss."""
    return config.ratio_to == "sampler" or config.importance_kind() is not None


def _sampling_metrics(
    rollout: Rollout, old: Tensor, config: PPOConfig, *, computed: bool
) -> dict[str, float]:
    """Return how far decoding and the sampler are from ``old``, where it was ``computed`` anew."""
    mask, metrics = rollout.tokens.response_mask, {}
    if rollout.logprobs is not None and computed:
        metrics = sampling_differences(rollout.logprobs, old, mask)
    if rollout.sampling_logprobs is not None and (computed or _corrects(config)):
        metrics |= mismatch_metrics(old - rollout.sampling_logprobs, mask)
    return metrics


def _old_and_reference_logprobs(
    rollout: Rollout, policy: LanguageModel, reference: LanguageModel, config: PPOConfig
) -> tuple[Tensor, Tensor, bool]:
    """Return log-probs [B, T] of the policy before the update and of the reference.

    The third is whether the policy's were computed.

    With another engine, truncated sampling, autocast, TF32, weights in int8, rounded trunk states
    or a rounded KV cache, the log-probs of the rollout are not those that the update will compute,
    and are computed once more.
    """
    temperature, max_tokens = rollout.sampling.temperature, config.forward_batch_tokens
    tokens, trunk_states = rollout.tokens, rollout.trunk_states

    def of_reference(part: Tokens, states: TrunkStates | None) -> Tensor:
        forward = reference.forward(part, states)
        return reference.logprobs(forward, part, temperature=temperature).logprobs

    def of_both(part: Tokens, states: TrunkStates | None) -> Tensor:
        return logprobs_of_both(policy, reference, part, states, temperature=temperature)

    old = rollout.logprobs
    known = not _rounds(config) and computes_in_float32(policy)
    if old is None or rollout.sampling.truncates or not known:
        packed = policy.packed and reference.packed
        old, ref = in_batches(of_both, tokens, trunk_states, max_tokens, packed=packed)
        return old, ref, True
    if tokens.trained is not None:
        old = old.masked_fill(~tokens.response_mask, 0.0)
    ref = in_batches(of_reference, tokens, trunk_states, max_tokens, packed=reference.packed)
    return old, ref, False


def _rounds(config: PPOConfig) -> bool:
    """Return whether decoding or the update reads numbers that the other has not rounded."""
    settings = (config.trunk_dtype, config.kv_cache_dtype, config.rollout_weights)
    return any(setting is not None for setting in settings)


def _weights(
    rollout: Rollout, old: Tensor, policy: LanguageModel, config: PPOConfig
) -> tuple[Tensor | None, Tensor | None]:
    """Return the weights of tokens in the policy loss, and those that get the entropy bonus."""
    tokens, mask = rollout.tokens, rollout.tokens.response_mask
    weights, high_entropy = None, None
    if (kind := config.importance_kind()) is not None:
        assert rollout.sampling_logprobs is not None
        log_ratios = old - rollout.sampling_logprobs
        weights = importance_weights(log_ratios, mask, kind, config.importance_range)
    if config.entropy_bonus_share == 1 and config.loss_token_share == 1:
        return weights, None

    def entropies_of(part: Tokens, states: TrunkStates | None) -> Tensor:
        forward = policy.forward(part, states)
        temperature = rollout.sampling.temperature
        found = policy.logprobs(forward, part, temperature=temperature, entropy=True).entropy
        assert found is not None
        return found

    entropies = in_batches(
        entropies_of,
        tokens,
        rollout.trunk_states,
        config.forward_batch_tokens,
        packed=policy.packed,
    )
    if config.entropy_bonus_share < 1:
        high_entropy = highest(entropies, mask, config.entropy_bonus_share)
    if config.loss_token_share < 1:
        trained = highest(entropies, mask, config.loss_token_share).to(old)
        weights = trained if weights is None else weights * trained
    return weights, high_entropy


def less_kl(
    rewards: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    kl_coef: float,
    config: PPOConfig,
) -> Tensor:
    """Return the rewards [B, T] less the KL penalty of each token, with ``kl_in="reward"``.

    The penalty is ``kl_coef`` times the KL estimate (Ouyang et al. 2022, eq. 2).
    """
    if config.kl_in != "reward" or kl_coef == 0:
        return rewards
    kl = kl_estimate(logprobs, ref_logprobs, mask=mask, estimator=config.estimator(), clamp=True)
    return rewards - kl_coef * kl


def estimate_advantages(
    rewards: Tensor, values: Tensor, tokens: Tokens, critic: Critic, config: PPOConfig
) -> tuple[Tensor, Tensor]:
    """Compute advantages, and returns as the value function's targets, [B, T] each.

    A lambda of its own for either is VC-PPO's (Yuan et al. 2025, section 4.2).
    """
    lam: float | Tensor = config.gae_lambda if critic.bootstraps else 1.0
    lam_value = config.gae_lambda if config.gae_lambda_value is None else config.gae_lambda_value
    if config.gae_length_alpha is not None and critic.bootstraps:
        lam = length_lambda(tokens.trained_counts, config.gae_length_alpha).to(values)
    found = gae(rewards, values, mask=tokens.response_mask, gamma=config.gamma, lam=lam)
    if not critic.bootstraps or (not isinstance(lam, Tensor) and lam == lam_value):
        return found.advantages, found.returns
    targets = gae(rewards, values, mask=tokens.response_mask, gamma=config.gamma, lam=lam_value)
    return found.advantages, targets.returns


def length_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """Return each sequence's lambda [B]: 1 - 1 / (alpha * length), at least 0.

    Yue et al. 2025 (VAPO, arXiv 2504.05118), eq. 7.
    """
    return (1 - 1 / (alpha * lengths.clamp_min(1).double())).clamp_min(0)


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
    if not differences.numel():
        return {}
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
    ratio = 0.0 if config.ratio_to == "sampler" else metrics.get("first_max_log_ratio", 0.0)
    mean = metrics.get("sampling_logprob_difference", 0.0)
    largest = metrics.get("sampling_logprob_difference_max", 0.0)
    if ratio > (MOST_FIRST_LOG_RATIO if full else MOST_FIRST_LOG_RATIO_HALF):
        found = f"the first minibatch's ratios are not 1: exp({ratio:.2g}) at most"
    elif full and not _rounds(config) and largest > MOST_FIRST_LOG_RATIO:
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
    counts = rollout.tokens.trained_counts
    count, rows = max(float(counts.sum()), 1.0), max(float((counts > 0).sum()), 1.0)
    kl = float((old - ref).sum())
    return {
        "mean_reward": float(scores.mean()),
        "reward_std": float(scores.std(correction=0)),
        "kl_divergence": kl / count,
        "kl_sequence": kl / rows,
        # without truncation tokens are drawn from softmax(x / t): minus their mean log-prob
        # estimates its entropy
        "entropy": -float(old.sum()) / count,
        "mean_advantage": float(advantages.sum()) / count,
        "response_length": float(lengths.sum()) / len(lengths),
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
    batches = batches_of(tokens, max_tokens, packed=policy.packed)
    parts = [policy.compute_trunk_states(tokens.select(rows)) for rows in batches]
    joined = join_trunk_states(parts)
    assert joined is not None
    return joined.select(torch.cat(batches).argsort())
