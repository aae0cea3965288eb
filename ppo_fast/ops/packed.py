"""Packed batches: sequences one after another in [total], without padding."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor


class Packing:
    """Where the sequences of a packed batch begin and end.

    Args:
        op: name of the op, for errors.
        cu_seqlens: [B + 1] int32 or int64 on the CPU: sequence i is [cu_seqlens[i],
            cu_seqlens[i + 1]), as for FlashAttention.
        like: a packed tensor [total].

    Raises:
        TypeError, ValueError: ``cu_seqlens`` is something else, or ``like`` does not fit it.
    """

    def __init__(self, op: str, cu_seqlens: Tensor, like: Tensor) -> None:
        self._op, self._total = op, _checked_total(op, cu_seqlens)
        self._check(like)
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        self._shape = len(lengths), int(lengths.max()) if len(lengths) else 0
        row = torch.repeat_interleave(torch.arange(len(lengths), device="cpu"), lengths)
        column = torch.arange(self._total, device="cpu") - starts[row]
        self._index = (row * self._shape[1] + column).to(like.device)

    @overload
    def pad(self, packed: Tensor) -> Tensor: ...
    @overload
    def pad(self, packed: None) -> None: ...
    def pad(self, packed: Tensor | None) -> Tensor | None:
        """Return [total] as [B, T], with zeros (False) behind each sequence; None for None."""
        if packed is None:
            return None
        self._check(packed)
        flat = packed.new_zeros(self._shape[0] * self._shape[1])
        return flat.index_copy(0, self._index, packed).view(self._shape)

    def unpad(self, padded: Tensor) -> Tensor:
        """Return the [total] of the sequences in [B, T]."""
        return padded.flatten()[self._index]

    def mask(self) -> Tensor:
        """Return [B, T] bool, True where there is a token."""
        return self.pad(torch.ones(self._total, dtype=torch.bool, device=self._index.device))

    def _check(self, packed: Tensor) -> None:
        if not isinstance(packed, Tensor) or packed.shape != (self._total,):
            got = list(packed.shape) if isinstance(packed, Tensor) else type(packed).__name__
            raise ValueError(
                f"{self._op}: cu_seqlens ends at {self._total}, so that tensors are packed as "
                f"[{self._total}]; got {got} (for [1, total], use x.squeeze(0))"
            )


def _checked_total(op: str, cu_seqlens: Tensor) -> int:
    expected = "expected [B + 1] int32 or int64 on the CPU"
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
        raise TypeError(f"{op}: cu_seqlens is {got}, {expected}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"{op}: cu_seqlens is {list(cu_seqlens.shape)}, {expected}")
    if not cu_seqlens.is_cpu:
        raise ValueError(
            f"{op}: cu_seqlens is on {cu_seqlens.device}, {expected}: its values are read, for "
            "which the host would wait; use cu_seqlens.cpu()"
        )
    if cu_seqlens[0] != 0 or (cu_seqlens.diff() < 0).any():
        raise ValueError(
            f"{op}: cu_seqlens is {cu_seqlens.tolist()[:6]}..., expected numbers from 0 that do "
            "not fall"
        )
    return int(cu_seqlens[-1])
