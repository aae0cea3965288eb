"""Launcher of the C++ kernel, csrc/kernels/sample_tokens.hpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.ops.backends.cpp_launch import DTYPE_CODES, address, vouched
from ppo_fast.ops.backends.cpus import num_threads


def sample_tokens(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same as reference.sample_tokens, on CPU tensors.

    Logits are [B, V] of any strides, seeds and positions [B] int64.
    """
    from ppo_fast.ops import _C

    num_rows, vocab_size = logits.shape
    if logits.stride(1) != 1 and vocab_size > 1:
        logits = logits.contiguous()
    seeds = vouched("seeds", seeds, (num_rows,), torch.int64)
    positions = vouched("positions", positions, (num_rows,), torch.int64)
    tokens = torch.empty(num_rows, dtype=torch.int64, device="cpu")
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprobs = torch.empty(num_rows, dtype=work, device="cpu")
    sampling_logprobs = torch.empty(num_rows, dtype=work, device="cpu")
    _C.sample_tokens(
        dtype=DTYPE_CODES[logits.dtype],
        logits=address(logits),
        row_stride=logits.stride(0),
        num_rows=num_rows,
        vocab_size=vocab_size,
        seeds=address(seeds),
        positions=address(positions),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        tokens=address(tokens),
        logprobs=address(logprobs),
        sampling_logprobs=address(sampling_logprobs),
        num_threads=num_threads(),
    )
    return tokens, logprobs, sampling_logprobs
