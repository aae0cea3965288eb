"""The small case on which the kernels of logprobs_from_logits are compared with float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.ops.backends.side import Side, nan_outside
from ppo_fast.ops.logprobs.api import logprobs_from_logits

DTYPES = (torch.float32, torch.bfloat16)


def case(side: Side) -> dict[str, Tensor]:
    """Return outputs and gradients of ``logprobs_from_logits`` on random input, by name."""
    mask, labels = side.mask(4), side.integers(4129, 4)
    logits = nan_outside(mask[:, None], side.normal(4, 4129, scale=3.0)).requires_grad_()
    labels = labels.masked_fill(~mask, -100)
    out = logprobs_from_logits(logits, labels, mask=mask, temperature=0.7, impl=side.impl)
    assert out.entropy is not None
    gradients = side.gradients([out.logprobs, out.entropy], logits=logits)
    return {"logprobs": out.logprobs, "entropy": out.entropy, **gradients}
