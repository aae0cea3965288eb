"""The small case on which the kernels of sample_tokens are compared with float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.ops.backends.side import Side
from ppo_fast.ops.sample_tokens.api import sample_tokens

DTYPES = (torch.float32, torch.bfloat16)


def case(side: Side) -> dict[str, Tensor]:
    """Return the outputs of ``sample_tokens`` on random input, by name."""
    logits, seeds = side.normal(2, 4129, scale=3.0), side.integers(2**62, 2) - 2**61
    positions = side.integers(2**20, 2)
    found: dict[str, Tensor] = {}
    for words, top_k, top_p in (("", 0, 1.0), ("truncated ", 50, 0.9)):
        drawn = sample_tokens(
            logits, seeds, positions, temperature=0.7, top_k=top_k, top_p=top_p, impl=side.impl
        )
        found |= {words + name: x for name, x in drawn._asdict().items()}
    return found
