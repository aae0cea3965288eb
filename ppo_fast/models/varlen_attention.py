"""Attention of rows of different lengths on a GPU: torch's, or flash-attn's where it has none."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor


class RowEnds(NamedTuple):
    """Where rows end, for the kernels: ends [n + 1] int32 after a 0, on the device.

    most: the longest row.
    """

    ends: Tensor
    most: int

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> RowEnds:
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
        return cls(ends.to(device), max(lengths))


# (query [N, H, d], key and value [M, K, d], rows of queries and of keys, scaling, window (0: none))
# -> [N, H, d]. The last query of a row is beside its last key.
Varlen = Callable[[Tensor, Tensor, Tensor, RowEnds, RowEnds, float | None, int], Tensor]


@cache
def varlen_attention() -> Varlen | None:
    """Return attention of rows of different lengths; None: neither library has one."""
    return _of_torch() or _of_flash_attn()


def _of_torch() -> Varlen | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before 2.10
        return None
    if not {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return None

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: RowEnds,
        keys: RowEnds,
        scaling: float | None,
        window: int,
    ) -> Tensor:
        found = varlen_attn(
            q,
            k,
            v,
            queries.ends,
            keys.ends,
            queries.most,
            keys.most,
            scale=scaling,
            window_size=(window - 1, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        assert isinstance(found, Tensor)
        return found

    return attend


def _of_flash_attn() -> Varlen | None:
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError:
        return None
    function: Any = flash_attn_varlen_func

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: RowEnds,
        keys: RowEnds,
        scaling: float | None,
        window: int,
    ) -> Tensor:
        return function(
            q,
            k,
            v,
            queries.ends,
            keys.ends,
            queries.most,
            keys.most,
            softmax_scale=scaling,
            causal=True,
            window_size=(window - 1, 0),
        )

    return attend
