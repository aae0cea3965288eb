"""Generalised advantage estimation: the public function."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.ops.backends import library
from ppo_fast.ops.backends.dispatch import choose
from ppo_fast.ops.backends.impls import Impl
from ppo_fast.ops.gae import reference
from ppo_fast.ops.gradient import computed_in, constant
from ppo_fast.ops.packed import Packing
from ppo_fast.ops.validation import check_tokens


class GAE(NamedTuple):
    """Advantages and returns: both of the shape of rewards, 0 at masked steps, without gradient."""

    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap_value: Tensor | None = None,
    gamma: float,
    lam: float | Tensor,
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
) -> GAE:
    """Estimate generalised advantages: Schulman et al. 2016 (arXiv 1506.02438), eq. 11-16.

    Per row, from the last step to the first, with t' the next valid step after t::

        delta_t = r_t + gamma * V_t' - V_t
        A_t = delta_t + gamma * lam * A_t'
        returns_t = A_t + V_t

    Legend: B sequences, T steps (response tokens).

    Args:
        rewards: [B, T], float32 or float64; bfloat16 and float16 are computed in float32.
        values: [B, T], V_t, the value of the state that step t starts from.
        mask: [B, T] bool, True where a step counts. Masked steps, interior ones too, are skipped:
            V_t' and A_t' are those of the next step that counts, and what the other tensors hold at
            masked steps (NaN as well) is ignored. Default: all count.
        dones: [B, T] bool, True where the episode ends with the step: V_t' = A_t' = 0 there.
            Default: nowhere.
        bootstrap_value: [B], the value that follows the last valid step. Default: 0.
        gamma: discount, in [0, 1].
        lam: a number in [0, 1], or one for each row as a [B] tensor, whose range is not checked
            (on an accelerator that would wait for the device).
        cu_seqlens: [B + 1] int32 or int64 on the CPU, for packed sequences: rewards, values, mask
            and dones are [total], and sequence i is [cu_seqlens[i], cu_seqlens[i + 1]).
        impl: see ppo_fast.ops.backends.dispatch.

    Returns:
        GAE(advantages, returns): of the shape of rewards, float64 if rewards or values are and
        float32 otherwise, exactly 0 at masked steps. Advantages are constants in PPO: neither
        carries a gradient, whatever ``impl``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, tensors on several devices, gamma or lam outside [0, 1].
        RuntimeError, NotImplementedError: ``impl`` cannot run here; see ops/backends/dispatch.py.
    """
    if cu_seqlens is not None:
        packing = Packing("gae", cu_seqlens, rewards)
        found = gae(
            packing.pad(rewards),
            packing.pad(values),
            mask=packing.mask() if mask is None else packing.pad(mask),
            dones=packing.pad(dones),
            bootstrap_value=bootstrap_value,
            gamma=gamma,
            lam=lam,
            impl=impl,
        )
        return GAE(*map(packing.unpad, found))
    check_tokens("gae", {"rewards": rewards, "values": values}, {"mask": mask})
    num_rows, device = rewards.shape[0], rewards.device
    if dones is not None:
        _check_tensor("dones", dones, list(rewards.shape), device, floats=False)
    if bootstrap_value is not None:
        _check_tensor("bootstrap_value", bootstrap_value, [num_rows], device)
    if isinstance(lam, Tensor):
        _check_tensor("lam", lam, [num_rows], device)
    else:
        _check_fraction("lam", lam)
    _check_fraction("gamma", gamma)

    dtype = computed_in(torch.promote_types(rewards.dtype, values.dtype))
    rewards, values = constant(rewards, dtype), constant(values, dtype)
    if bootstrap_value is None:
        bootstrap_value = torch.zeros(num_rows, dtype=dtype, device=device)
    if not isinstance(lam, Tensor):
        lam = torch.full((num_rows,), lam, dtype=dtype, device=device)
    bootstrap_value, lam = constant(bootstrap_value, dtype), constant(lam, dtype)
    chosen = choose("gae", impl, device, dtype).impl
    run = reference.gae if chosen == "reference" else library.gae[chosen]
    return GAE(*run(rewards, values, mask, dones, bootstrap_value, lam, float(gamma)))


def _check_tensor(
    name: str, tensor: Tensor, shape: list[int], device: torch.device, *, floats: bool = True
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"gae: {name} is {type(tensor).__name__}, expected a tensor {shape}")
    if list(tensor.shape) != shape:
        raise ValueError(f"gae: {name} is {list(tensor.shape)}, expected {shape}")
    if floats and not tensor.is_floating_point():
        raise TypeError(f"gae: {name} is {tensor.dtype}, expected floats; use {name}.float()")
    if not floats and tensor.dtype is not torch.bool:
        raise TypeError(f"gae: {name} is {tensor.dtype}, expected bool; use {name}.bool()")
    if tensor.device != device:
        raise ValueError(f"gae: {name} is on {tensor.device} but rewards on {device}; move one")


def _check_fraction(name: str, number: float) -> None:
    if not isinstance(number, (int, float)):
        raise TypeError(f"gae: {name} is {type(number).__name__}, expected a number in [0, 1]")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"gae: {name} is {number}, expected a number in [0, 1]")
