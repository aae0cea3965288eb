"""The specification of generalised advantage estimation in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap_value: Tensor,
    lam: Tensor,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """Compute advantages and returns, [B, T], from rewards and values [B, T], float32 or float64.

    Schulman et al. 2016 (arXiv 1506.02438), eq. 11-16, from the last step to the first. With t' the
    next valid step (after the last one: bootstrap_value [B] and an advantage of 0; nothing where
    dones [B, T] says that the episode ends with t):

        delta_t = r_t + gamma * V_t' - V_t
        A_t = delta_t + gamma * lam * A_t'
        returns_t = A_t + V_t

    Masked steps (mask [B, T], False) are skipped and get 0. lam is [B].
    """
    decay = gamma * lam
    next_value, next_advantage = bootstrap_value, torch.zeros_like(bootstrap_value)
    columns = []
    for t in reversed(range(rewards.shape[1])):
        value = values[:, t]
        value_after, advantage_after = next_value, next_advantage
        if dones is not None:
            value_after = value_after.masked_fill(dones[:, t], 0.0)
            advantage_after = advantage_after.masked_fill(dones[:, t], 0.0)
        delta = rewards[:, t] + gamma * value_after - value
        advantage = delta + decay * advantage_after
        columns.append(advantage)
        if mask is None:
            next_value, next_advantage = value, advantage
        else:
            next_value = torch.where(mask[:, t], value, next_value)
            next_advantage = torch.where(mask[:, t], advantage, next_advantage)
    if not columns:
        return torch.zeros_like(rewards), torch.zeros_like(rewards)
    advantages = torch.stack(columns[::-1], dim=1)
    returns = advantages + values
    if mask is not None:
        advantages, returns = advantages.masked_fill(~mask, 0.0), returns.masked_fill(~mask, 0.0)
    return advantages, returns
