"""The small case on which the kernels of kl_estimate are compared with float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.ops.backends.side import Side, nan_outside
from ppo_fast.ops.kl_estimate.api import kl_estimate

DTYPES = (torch.float32,)


def case(side: Side) -> dict[str, Tensor]:
    """Return outputs and gradients of ``kl_estimate`` on random input, by name."""
    mask = side.mask(3, 701)
    found: dict[str, Tensor] = {}
    for estimator in ("k3", "k1+k2"):
        logprobs = nan_outside(mask, side.normal(3, 701, scale=0.5)).requires_grad_()
        ref = nan_outside(mask, side.normal(3, 701, scale=0.5))
        kl = kl_estimate(logprobs, ref, mask=mask, estimator=estimator, impl=side.impl)
        (gradient,) = side.gradients([kl], logprobs=logprobs).values()
        found |= {estimator: kl, f"gradient of {estimator}": gradient}
    return found
