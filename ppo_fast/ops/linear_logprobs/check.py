"""The small case on which the kernels of linear_logprobs are compared with float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.ops.backends.side import Side, nan_outside
from ppo_fast.ops.linear_logprobs.api import linear_logprobs

DTYPES = (torch.float32, torch.bfloat16)


def case(side: Side) -> dict[str, Tensor]:
    """Return outputs and gradients of ``linear_logprobs`` on random input, by name."""
    mask, labels = side.mask(9), side.integers(507, 9)
    hidden = nan_outside(mask[:, None], side.normal(9, 64)).requires_grad_()
    weight = side.normal(507, 64, scale=0.3).requires_grad_()
    bias = side.normal(507).requires_grad_()
    out = linear_logprobs(
        hidden,
        weight,
        labels,
        bias=bias,
        mask=mask,
        temperature=0.7,
        logit_scale=0.5,
        softcap=5.0,
        logits_budget_bytes=0,
        impl=side.impl,
    )
    assert out.entropy is not None
    gradients = side.gradients([out.logprobs, out.entropy], hidden=hidden, weight=weight, bias=bias)
    return {"logprobs": out.logprobs, "entropy": out.entropy, **gradients}
