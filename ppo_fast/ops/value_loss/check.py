"""The small case on which the kernels of value_loss are compared with float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.ops.backends.side import Side, nan_outside
from ppo_fast.ops.stats import VALUE_STATS
from ppo_fast.ops.value_loss.api import value_loss

DTYPES = (torch.float32,)


def case(side: Side) -> dict[str, Tensor]:
    """Return outputs and gradients of ``value_loss`` on random input, by name."""
    mask = side.mask(3, 701)
    values, old, returns = (nan_outside(mask, side.normal(3, 701)) for _ in range(3))
    values.requires_grad_()
    out, huber = (
        value_loss(
            values,
            old_values=old,
            returns=returns,
            mask=mask,
            clip=0.5,
            huber=delta,
            impl=side.impl,
        )
        for delta in (None, 0.7)
    )
    metrics = dict(zip(VALUE_STATS, out.metrics.unbind(), strict=True))
    gradients = side.gradients([out.loss, huber.loss], values=values)
    return {"loss": out.loss, "Huber loss": huber.loss, **metrics, **gradients}
