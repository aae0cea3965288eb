"""Launcher of the C++ kernel, csrc/gae.hpp."""

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
    """As reference.gae, on CPU tensors: rewards, values [B, T] and bootstrap_value, lam [B] of one
    dtype, float32 or float64; mask and dones [B, T] bool. Any strides.

    The kernel gets addresses: a call costs 5 us so, and 14 us with numpy arrays. It trusts them,
    and so this function, not the caller, is what vouches for shapes, dtypes and layout.
    """
    from ppo_fast import _C

    kernel = {torch.float32: _C.gae_float32, torch.float64: _C.gae_float64}[rewards.dtype]
    num_rows, num_steps = rewards.shape
    step, row = (num_rows, num_steps), (num_rows,)
    # Bound to names, so that the copies live until the kernel has returned.
    rewards = _vouched("rewards", rewards, step, rewards.dtype)
    values = _vouched("values", values, step, rewards.dtype)
    mask = None if mask is None else _vouched("mask", mask, step, torch.bool)
    dones = None if dones is None else _vouched("dones", dones, step, torch.bool)
    bootstrap_value = _vouched("bootstrap_value", bootstrap_value, row, rewards.dtype)
    lam = _vouched("lam", lam, row, rewards.dtype)
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    kernel(
        rewards=rewards.data_ptr(),
        values=values.data_ptr(),
        mask=0 if mask is None else mask.data_ptr(),
        dones=0 if dones is None else dones.data_ptr(),
        bootstrap_value=bootstrap_value.data_ptr(),
        lam=lam.data_ptr(),
        advantages=advantages.data_ptr(),
        returns=returns.data_ptr(),
        num_rows=num_rows,
        num_steps=num_steps,
        gamma=gamma,
        num_threads=torch.get_num_threads(),
    )
    return advantages, returns


def _vouched(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
        got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"gae_cpp: {name} is {got}, expected {dtype} {shape} on cpu")
    return tensor.contiguous()
