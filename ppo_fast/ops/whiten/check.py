"""The small case on which the kernels of whiten are compared with float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.ops.backends.side import Side, nan_outside
from ppo_fast.ops.whiten.api import whiten

DTYPES = (torch.float32,)


def case(side: Side) -> dict[str, Tensor]:
    """Return outputs and gradients of ``whiten`` on random input, by name."""
    mask = side.mask(3, 701)
    values = nan_outside(mask, side.normal(3, 701, scale=3.0)).requires_grad_()
    whitened = whiten(values, mask=mask, impl=side.impl)
    return {"whitened": whitened, **side.gradients([whitened], values=values)}
