"""Launchers of the C++ kernels, csrc/kernels/logprobs.hpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.ops.backends.cpp_launch import (
    DTYPE_CODES,
    address,
    empty,
    merged_strides,
    vouched,
    vouched_or_none,
)
from ppo_fast.ops.backends.cpus import num_threads


def logprobs_forward(
    logits: Tensor, labels: Tensor, mask: Tensor | None, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute log-probs, entropies and the statistics that backward needs, on the CPU.

    Logits are [..., V] of any strides; log-probs are [...], entropies [...] (an empty tensor
    without ``with_entropy``), statistics [..., 2].
    """
    from ppo_fast.ops import _C

    lead = tuple(logits.shape[:-1])
    labels = vouched("labels", labels, lead, torch.int64)
    mask = vouched_or_none("mask", mask, lead, torch.bool)
    logits, layout = _rows(logits)
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprobs = torch.empty(lead, dtype=work, device="cpu")
    stats = torch.empty(*lead, 2, dtype=work, device="cpu")
    entropy = torch.empty(lead if with_entropy else 0, dtype=work, device="cpu")
    _C.logprobs_forward(
        **layout,
        labels=address(labels),
        mask=address(mask),
        temperature=temperature,
        logprobs=address(logprobs),
        entropy=address(entropy) if with_entropy else 0,
        stats=address(stats),
        num_threads=num_threads(),
    )
    return logprobs, entropy, stats


def logprobs_backward(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    temperature: float,
    entropy: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Compute the gradient of the logits, [..., V] contiguous, in their dtype."""
    from ppo_fast.ops import _C

    lead = tuple(logits.shape[:-1])
    labels = vouched("labels", labels, lead, torch.int64)
    mask = vouched_or_none("mask", mask, lead, torch.bool)
    grad_logits = empty(tuple(logits.shape), logits.dtype)
    logits, layout = _rows(logits)
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    stats = vouched("stats", stats, (*lead, 2), work)
    grad_logprobs = vouched_or_none("grad_logprobs", grad_logprobs, lead, work)
    grad_entropy = vouched_or_none("grad_entropy", grad_entropy, lead, work)
    entropies = None if grad_entropy is None else vouched("entropy", entropy, lead, work)
    _C.logprobs_backward(
        **layout,
        labels=address(labels),
        mask=address(mask),
        temperature=temperature,
        entropy=address(entropies),
        stats=address(stats),
        grad_logprobs=address(grad_logprobs),
        grad_entropy=address(grad_entropy),
        grad_logits=address(grad_logits),
        num_threads=num_threads(),
    )
    return grad_logits


def _rows(logits: Tensor) -> tuple[Tensor, dict[str, int]]:
    """Return logits [..., V] in a layout that the kernels read, and the arguments that describe it.

    The vocabulary is contiguous, and the dimensions before it have at most two strides, as in
    logits[:, :-1] of [B, T, V]. Other layouts are copied.
    """
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    sizes, strides = merged_strides(logits)
    if len(sizes) > 2:
        logits = logits.contiguous()
        sizes, strides = merged_strides(logits)
    outer_stride, inner, inner_stride = 0, 1, 0
    if len(sizes) == 2:
        outer_stride, inner, inner_stride = strides[0], sizes[1], strides[1]
    elif len(sizes) == 1:
        outer_stride = strides[0]
    return logits, {
        "dtype": DTYPE_CODES[logits.dtype],
        "logits": address(logits),
        "outer_stride": outer_stride,
        "inner": inner,
        "inner_stride": inner_stride,
        "num_rows": logits.numel() // logits.shape[-1],
        "vocab_size": logits.shape[-1],
    }
