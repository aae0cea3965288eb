"""The small case on which the kernels of ppo_loss are compared with float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops.backends.side import Side, nan_outside
from ppo_fast.ops.ppo_loss.api import ppo_loss
from ppo_fast.ops.stats import PPO_STATS

DTYPES = (torch.float32,)


def case(side: Side) -> dict[str, Tensor]:
    """Return outputs and gradients of ``ppo_loss`` on random input, by name."""
    mask = side.mask(3, 701)
    names = ("logprobs", "entropy", "old_logprobs", "advantages", "ref_logprobs")
    x: dict[str, Any] = {name: nan_outside(mask, side.normal(3, 701, scale=0.5)) for name in names}
    logprobs, entropy = x["logprobs"].requires_grad_(), x["entropy"].requires_grad_()
    out = ppo_loss(
        **x,
        mask=mask,
        dual_clip=1.5,
        kl_coef=0.1,
        kl_estimator="k3",
        entropy_coef=0.02,
        aggregation="seq-mean-token-mean",
        impl=side.impl,
    )
    weights = nan_outside(mask, side.normal(3, 701).abs())
    weighted = ppo_loss(
        **x, weights=weights, mask=mask, ratio="sequence", objective="mask", impl=side.impl
    )
    losses = [out.loss, weighted.loss]
    gradients = side.gradients(losses, logprobs=logprobs, entropy=entropy)
    metrics = dict(zip(PPO_STATS, out.metrics.unbind(), strict=True))
    return {"loss": out.loss, "weighted loss": weighted.loss, **metrics, **gradients}
