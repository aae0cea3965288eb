"""Launcher of the C++ kernel, csrc/kernels/ppo_loss.hpp."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from ppo_fast.ops.backends.cpp_launch import DTYPE_CODES, address, vouched, vouched_or_none
from ppo_fast.ops.backends.cpus import num_threads
from ppo_fast.ops.kl_estimate.api import ESTIMATORS
from ppo_fast.ops.ppo_loss.api import Aggregation, Objective, Ratio
from ppo_fast.ops.stats import PPO_STATS

# The enum classes in csrc/kernels/kl_estimate.hpp and csrc/kernels/ppo_loss.hpp have the same
# orders.
ESTIMATOR_CODES = {name: code for code, name in enumerate(ESTIMATORS)}
AGGREGATION_CODES = {name: code for code, name in enumerate(get_args(Aggregation))}
RATIO_CODES = {name: code for code, name in enumerate(get_args(Ratio))}
OBJECTIVE_CODES = {name: code for code, name in enumerate(get_args(Objective))}


def ppo_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    mask: Tensor,
    ratio: str,
    objective: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl_coef: float | Tensor,
    kl_estimator: str,
    entropy_coef: float | Tensor,
    aggregation: str,
    normalizer: float | Tensor | None,
    num_gradients: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute loss [], metrics [K] and gradients [num_gradients, B, T] on the CPU.

    ``num_gradients`` is 0 (none), 1 (of the log-probs) or 2 (of the entropy too). Tensors are
    [B, T] of one dtype, float32 or float64; the mask is bool.
    """
    from ppo_fast.ops import _C

    dtype, shape = logprobs.dtype, tuple(logprobs.shape)
    num_rows, num_steps = shape
    logprobs = vouched("logprobs", logprobs, shape, dtype)
    old_logprobs = vouched("old_logprobs", old_logprobs, shape, dtype)
    advantages = vouched("advantages", advantages, shape, dtype)
    mask = vouched("mask", mask, shape, torch.bool)
    entropy = vouched_or_none("entropy", entropy, shape, dtype)
    ref_logprobs = vouched_or_none("ref_logprobs", ref_logprobs, shape, dtype)
    weights = vouched_or_none("weights", weights, shape, dtype)
    loss = torch.empty((), dtype=dtype, device="cpu")
    stats = torch.empty(len(PPO_STATS), dtype=torch.float32, device="cpu")
    gradients = torch.empty(num_gradients, num_rows, num_steps, dtype=dtype, device="cpu")
    gradient_bytes = num_rows * num_steps * dtype.itemsize
    _C.ppo_loss(
        dtype=DTYPE_CODES[dtype],
        logprobs=address(logprobs),
        old_logprobs=address(old_logprobs),
        advantages=address(advantages),
        mask=address(mask),
        entropy=address(entropy),
        ref_logprobs=address(ref_logprobs),
        weights=address(weights),
        ratio=RATIO_CODES[ratio],
        objective=OBJECTIVE_CODES[objective],
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=math.inf if dual_clip is None else dual_clip,
        kl_coef=float(kl_coef),
        kl_estimator=ESTIMATOR_CODES[kl_estimator],
        entropy_coef=float(entropy_coef),
        aggregation=AGGREGATION_CODES[aggregation],
        # A normalizer of 0 counts as 1; to the kernel 0 means "count the tokens".
        normalizer=0.0 if normalizer is None else float(normalizer) or 1.0,
        loss=address(loss),
        stats=address(stats),
        grad_logprobs=address(gradients) if num_gradients > 0 else 0,
        grad_entropy=address(gradients) + gradient_bytes if num_gradients > 1 else 0,
        num_rows=num_rows,
        num_steps=num_steps,
        num_threads=num_threads(),
    )
    return loss, stats, gradients
