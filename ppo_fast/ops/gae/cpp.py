"""Launcher of the C++ kernel, csrc/kernels/gae.hpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.ops.backends.cpp_launch import DTYPE_CODES, address, vouched, vouched_or_none
from ppo_fast.ops.backends.cpus import num_threads


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap_value: Tensor,
    lam: Tensor,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """Compute the same as reference.gae, on CPU tensors of any strides.

    Rewards, values [B, T] and bootstrap_value, lam [B] have one dtype, float32 or float64; mask and
    dones [B, T] are bool.
    """
    from ppo_fast.ops import _C

    dtype, step = rewards.dtype, tuple(rewards.shape)
    num_rows, num_steps = step
    rewards = vouched("rewards", rewards, step, dtype)
    values = vouched("values", values, step, dtype)
    mask = vouched_or_none("mask", mask, step, torch.bool)
    dones = vouched_or_none("dones", dones, step, torch.bool)
    bootstrap_value = vouched("bootstrap_value", bootstrap_value, (num_rows,), dtype)
    lam = vouched("lam", lam, (num_rows,), dtype)
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    _C.gae(
        dtype=DTYPE_CODES[dtype],
        rewards=address(rewards),
        values=address(values),
        mask=address(mask),
        dones=address(dones),
        bootstrap_value=address(bootstrap_value),
        lam=address(lam),
        gamma=gamma,
        advantages=address(advantages),
        returns=address(returns),
        num_rows=num_rows,
        num_steps=num_steps,
        num_threads=num_threads(),
    )
    return advantages, returns
