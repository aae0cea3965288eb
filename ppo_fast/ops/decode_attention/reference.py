"""The specification of ``decode_attention`` in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppo_fast.ops.gradient import computed_in, without_autocast


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scaling: float,
    window: int | None,
) -> Tensor:
    """Compute the attention of one query a row, [n, H, d]; arguments as in the public function.

    Vaswani et al. 2017 (arXiv 1706.03762), eq. 1, with the heads of Ainslie et al. 2023 (arXiv
    2305.13245): of H query heads, each group of H / K reads one head k of keys and values. With S
    the columns that row i sees, which are the last ``window`` of those before lengths[i]:

        p_j = exp(scaling * q . k_j) / sum_{l in S} exp(scaling * q . k_l)      for j in S
        result = sum_{j in S} p_j v_j                                           0 where S is empty
    """
    num_rows, num_heads, head_size = query.shape
    num_columns, num_kv_heads = keys.shape[1:3]
    dtype = computed_in(query.dtype)
    column = torch.arange(num_columns, device=query.device)
    end = lengths.clamp(max=num_columns)[:, None]
    hidden = column >= end
    if window is not None:
        hidden = hidden | (column < end - window)
    hidden = hidden[:, None, None]  # as [n, K, H / K, L]
    # [n, K, L, d]; hidden values are zeroed, since a weight of 0 times NaN is NaN.
    k, v = (x.to(dtype).transpose(1, 2) for x in (keys, values))
    v = v.masked_fill(hidden.squeeze(2)[..., None], 0.0)
    q = query.to(dtype).view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_size)
    with without_autocast(query.device):
        scores = (q @ k.transpose(2, 3) * scaling).masked_fill(hidden, -math.inf)
        weights = scores.softmax(dim=-1).masked_fill(hidden, 0.0)
        return (weights @ v).view(query.shape).to(query.dtype)
