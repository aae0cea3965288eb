"""The small case on which the kernels of decode_attention are compared with float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.ops.backends.side import Side, nan_outside
from ppo_fast.ops.decode_attention.api import decode_attention

DTYPES = (torch.float32, torch.bfloat16)


def case(side: Side) -> dict[str, Tensor]:
    """Return outputs of ``decode_attention`` on a slice of a random cache, by name.

    The cache holds NaN in unseen columns; rows see from one column to three chunks.
    """
    lengths = torch.tensor([1, 507, 1203], device=side.device)
    query = side.normal(3, 6, 80)
    keys, values = side.normal(4, 1301, 2, 80)[:3], side.normal(4, 1301, 2, 80)[:3]
    column = torch.arange(1301, device=side.device)
    found: dict[str, Tensor] = {}
    for words, window in (("result", None), ("with a window", 600)):
        seen = column < lengths[:, None]
        if window is not None:
            seen &= column >= lengths[:, None] - window
        k, v = (nan_outside(seen[..., None, None], x)[:, :1203] for x in (keys, values))
        found[words] = decode_attention(
            query, k, v, lengths, scaling=80**-0.5, window=window, impl=side.impl
        )
    return found
