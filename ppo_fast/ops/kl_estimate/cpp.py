"""Launcher of the C++ kernel, csrc/kernels/kl_estimate.hpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.ops.backends.cpp_launch import DTYPE_CODES, address, vouched, vouched_or_none
from ppo_fast.ops.backends.cpus import num_threads
from ppo_fast.ops.kl_estimate.api import ESTIMATORS

# enum class KlEstimator in csrc/kernels/kl_estimate.hpp has the same order.
ESTIMATOR_CODES = {name: code for code, name in enumerate(ESTIMATORS)}


def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimator: str, with_slope: bool
) -> tuple[Tensor, Tensor]:
    """Compute the estimate [B, T] and its derivative in ``logprobs`` on the CPU.

    The derivative is an empty tensor without ``with_slope``. Log-probs are [B, T] of one dtype,
    float32 or float64; the mask is bool.
    """
    from ppo_fast.ops import _C

    dtype, shape = logprobs.dtype, tuple(logprobs.shape)
    logprobs = vouched("logprobs", logprobs, shape, dtype)
    ref_logprobs = vouched("ref_logprobs", ref_logprobs, shape, dtype)
    mask = vouched_or_none("mask", mask, shape, torch.bool)
    estimate = torch.empty(shape, dtype=dtype, device="cpu")
    slope = torch.empty(shape if with_slope else 0, dtype=dtype, device="cpu")
    _C.kl_estimate(
        dtype=DTYPE_CODES[dtype],
        logprobs=address(logprobs),
        ref_logprobs=address(ref_logprobs),
        mask=address(mask),
        estimator=ESTIMATOR_CODES[estimator],
        estimate=address(estimate),
        slope=address(slope) if with_slope else 0,
        num_tokens=logprobs.numel(),
        num_threads=num_threads(),
    )
    return estimate, slope
