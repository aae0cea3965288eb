"""The small case on which the kernels of gae are compared with float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.ops.backends.side import Side, nan_outside
from ppo_fast.ops.gae.api import gae

DTYPES = (torch.float32,)


def case(side: Side) -> dict[str, Tensor]:
    """Return the outputs of ``gae`` on random input, by name."""
    mask, dones = side.mask(2, 1031), side.integers(40, 2, 1031) == 0
    out = gae(
        nan_outside(mask, side.normal(2, 1031)),
        nan_outside(mask, side.normal(2, 1031)),
        mask=mask,
        dones=dones,
        bootstrap_value=side.normal(2),
        gamma=0.99,
        lam=0.95,
        impl=side.impl,
    )
    return out._asdict()
