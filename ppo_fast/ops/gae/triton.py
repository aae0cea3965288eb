"""The Triton kernel of generalised advantage estimation, and its launcher.

csrc/kernels/gae.hpp states the formulas; the scan of a row is parallel. Bytes moved a
step: 16, and 1 each for mask and dones (the neighbour's value and mask come from the cache).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops.backends.triton_launch import Launch, kernel, launch

# Steps are scanned backwards, so that loads are of 4 bytes a thread, coalesced.
SCAN = Launch(1024, 8, registers=112)


@triton.jit
def latest_valid(value, valid, next_value, next_valid):
    """Of two stretches of the scan, the value at the last valid step, and whether there is one."""
    return tl.where(next_valid != 0, next_value, value), valid | next_valid


@triton.jit
def compose(slope, intercept, next_slope, next_intercept):
    """x -> slope * x + intercept, and then the next."""
    return slope * next_slope, next_slope * intercept + next_intercept


@triton.jit
def compose_until_done(slope, intercept, done, next_slope, next_intercept, next_done):
    """The same where a step that is done is constant: what it cuts off may be NaN."""
    carried = tl.where(next_done != 0, 0.0, next_slope * intercept)
    return slope * next_slope, carried + next_intercept, done | next_done


@triton.jit
def last_lane(x, lane, BLOCK: tl.constexpr):
    return tl.sum(tl.where(lane == BLOCK - 1, x, 0.0), 0)


@kernel
def gae_kernel(
    rewards,  # float32 [B, T]
    values,  # float32 [B, T]
    mask,  # bool [B, T], or None
    dones,  # bool [B, T], or None
    bootstrap_value,  # float32 [B]
    lam,  # float32 [B]
    advantages,  # out, float32 [B, T]
    returns,  # out, float32 [B, T]
    num_steps: tl.int64,
    gamma: tl.float32,
    BLOCK: tl.constexpr,
):
    """One program a row, from its last block of steps to its first.

    Lanes run backwards through the steps: associative_scan(reverse=True) is wrong on GPUs
    (https://github.com/triton-lang/triton/issues/4362).
    """
    row = tl.program_id(0).to(tl.int64)
    decay = gamma * tl.load(lam + row)
    bootstrap = tl.load(bootstrap_value + row)
    # Value and advantage of the first valid step in the blocks scanned so far, which come later.
    next_value = bootstrap
    next_advantage = 0.0
    lane = tl.arange(0, BLOCK)
    for scanned in range(0, num_steps, BLOCK):
        last = row * num_steps + (num_steps - 1 - scanned)
        inside = lane < tl.minimum(num_steps - scanned, BLOCK).to(tl.int32)
        follows = inside & ((lane > 0) | (scanned > 0))
        reward = tl.load(rewards + last - lane, mask=inside, other=0.0)
        value = tl.load(values + last - lane, mask=inside, other=0.0)
        value_after = tl.load(values + (last + 1) - lane, mask=follows, other=0.0)
        value_after = tl.where(follows, value_after, bootstrap)
        counts = inside
        if mask is not None:
            counts = tl.load(mask + last - lane, mask=inside, other=0) != 0
            valid_after = tl.load(mask + (last + 1) - lane, mask=follows, other=0).to(tl.int32)
            value_after, seen = tl.associative_scan((value_after, valid_after), 0, latest_valid)
            value_after = tl.where(seen != 0, value_after, next_value)
            next_value = last_lane(value_after, lane, BLOCK)

        # A step outside the mask hands on what comes to it.
        slope = tl.where(counts, decay, 1.0)
        if dones is not None:
            done = counts & (tl.load(dones + last - lane, mask=inside, other=0) != 0)
            value_after = tl.where(done, 0.0, value_after)
            intercept = tl.where(counts, reward + gamma * value_after - value, 0.0)
            slope, intercept, cut = tl.associative_scan(
                (slope, intercept, done.to(tl.int32)), 0, compose_until_done
            )
            carried = tl.where(cut != 0, 0.0, slope * next_advantage)
        else:
            intercept = tl.where(counts, reward + gamma * value_after - value, 0.0)
            slope, intercept = tl.associative_scan((slope, intercept), 0, compose)
            carried = slope * next_advantage
        advantage = carried + intercept
        next_advantage = last_lane(advantage, lane, BLOCK)
        tl.store(advantages + last - lane, tl.where(counts, advantage, 0.0), mask=inside)
        tl.store(returns + last - lane, tl.where(counts, advantage + value, 0.0), mask=inside)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap_value: Tensor,
    lam: Tensor,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """Compute the same as cpp.gae on a GPU, in float32."""
    num_rows, num_steps = rewards.shape
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    returns = torch.empty_like(advantages)
    launch(
        gae_kernel,
        num_rows,
        SCAN,
        rewards.device,
        rewards.contiguous(),
        values.contiguous(),
        mask if mask is None else mask.contiguous(),
        dones if dones is None else dones.contiguous(),
        bootstrap_value.contiguous(),
        lam.contiguous(),
        advantages,
        returns,
        num_steps,
        gamma,
    )
    return advantages, returns
