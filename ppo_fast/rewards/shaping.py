"""Shaping of rewards: penalties of length, normalisation, scale and clip."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.config import PPOConfig
from ppo_fast.data.experience import Moments
from ppo_fast.data.tokens import Tokens

EPSILON = 1e-4  # added to a standard deviation, which may be 0

NO_SCORES = Moments(0.0, 0.0, 0.0)


def place_scores(scores: Tensor, tokens: Tokens) -> Tensor:
    """Return rewards [B, T] of scores: [B], each on its response's last token, or [B, T].

    Of the latter, one of a token that is not trained on goes to the last before it that is, or to
    the first of all.
    """
    if scores.dim() == 2:
        if tokens.trained is None:
            return scores.masked_fill(~tokens.response_mask, 0.0)
        mask = tokens.response_mask
        positions = torch.arange(mask.shape[1], device=mask.device)
        before = torch.where(mask, positions, -1).cummax(1).values
        before = torch.where(before < 0, mask.int().argmax(1, keepdim=True), before)
        return torch.zeros_like(scores).scatter_add(1, before, scores)
    rewards = scores.new_zeros(tokens.response_ids.shape)
    return rewards.scatter(1, _last(tokens), scores[:, None])


def shape_rewards(
    rewards: Tensor,
    tokens: Tokens,
    finished: Tensor,
    config: PPOConfig,
    *,
    max_length: int | None = None,
    samples_per_prompt: int = 1,
    moments: Moments = NO_SCORES,
) -> tuple[Tensor, Moments]:
    """Apply the config's penalties, normalisation, scale and clip, in this order.

    A sequence's score is the sum of its rewards. Penalties are subtracted from it at its last
    token; to normalise, all its rewards are divided by the standard deviation, and the mean is
    subtracted at the last token.

    Args:
        rewards: [B, T], 0 beyond a response.
        tokens: the sequences.
        finished: [B] bool on the CPU, whether a response ended by itself.
        config: the settings whose names begin with reward\\_, overlong\\_ or missing\\_.
        max_length: number of tokens at which responses were cut off; None: the config's.
        samples_per_prompt: rows of a group, one after the other.
        moments: of the scores of all batches before.

    Returns:
        The rewards [B, T], and the moments with this batch's scores.
    """
    last = _last(tokens)
    penalty = length_penalty(tokens.response_lengths, max_length or config.max_length, config)
    penalty = penalty + config.missing_eos_penalty * ~finished
    if penalty.any():
        rewards = rewards.scatter_add(1, last, -penalty.to(rewards)[:, None])
    scores = rewards.sum(1)
    if config.reward_normalization == "running":
        moments = merge_moments(moments, scores)
    if config.reward_normalization is not None:
        groups = samples_per_prompt if config.reward_normalization == "group" else len(scores)
        rewards = (
            _normalized(rewards, last, *_running(scores, moments))
            if config.reward_normalization == "running"
            else normalize_groups(rewards, tokens, groups)
        )
    if config.reward_scale != 1:
        rewards = rewards * config.reward_scale
    if config.reward_clip is not None:
        rewards = rewards.clamp(-config.reward_clip, config.reward_clip)
    return rewards, moments


def length_penalty(lengths: Tensor, max_length: int, config: PPOConfig) -> Tensor:
    """Return the penalty of each response's length, [B] float32: Yu et al. 2025 (DAPO), eq. 13.

    It is 0 up to ``max_length - overlong_buffer`` tokens, and grows by a line to
    ``overlong_penalty`` at ``max_length``.
    """
    if config.overlong_buffer == 0:
        return torch.zeros(len(lengths), dtype=torch.float32, device="cpu")
    over = lengths - (max_length - config.overlong_buffer)
    share = (over.float() / config.overlong_buffer).clamp(0, 1)
    return config.overlong_penalty * share


def merge_moments(before: Moments, scores: Tensor) -> Moments:
    """Return the moments of all scores: Chan et al. 1979, eq. 2.1, in Python's float64."""
    new = scores.double()
    count, mean = float(len(new)), float(new.mean())
    squares = float((new - mean).square().sum())
    total = before.number + count
    shift = mean - before.mean
    return Moments(
        total,
        before.mean + shift * count / total,
        before.squares + squares + shift**2 * before.number * count / total,
    )


def normalize_groups(rewards: Tensor, tokens: Tokens, size: int) -> Tensor:
    """Return rewards [B, T] whose scores have mean 0 and deviation 1 in each group of rows.

    The standard deviation is that of n - 1, plus EPSILON: GRPO (Shao et al. 2024, section 4.1.1).
    """
    groups = rewards.sum(1).view(-1, size)
    mean = groups.mean(1, keepdim=True)
    std = ((groups - mean).square().sum(1, keepdim=True) / max(size - 1, 1)).sqrt()
    rows = (x.expand_as(groups).flatten() for x in (mean, std))
    return _normalized(rewards, _last(tokens), *rows)


def _running(scores: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of all scores so far, [B] each."""
    std = (moments.squares / max(moments.number - 1, 1)) ** 0.5
    return scores.new_full(scores.shape, moments.mean), scores.new_full(scores.shape, std)


def _normalized(rewards: Tensor, last: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Subtract a mean [B] at each sequence's last token, then divide all by std + EPSILON [B]."""
    return rewards.scatter_add(1, last, -mean[:, None]) / (std + EPSILON)[:, None]


def _last(tokens: Tokens) -> Tensor:
    return tokens.last_trained.to(tokens.device)[:, None]
