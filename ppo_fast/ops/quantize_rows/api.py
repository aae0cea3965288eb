"""quantize_rows: a weight in int8, for ``few_row_linear``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.ops.backends import library
from ppo_fast.ops.backends.dispatch import choose
from ppo_fast.ops.backends.impls import Impl
from ppo_fast.ops.quantize_rows import reference
from ppo_fast.ops.validation import HALF


class QuantizedRows(NamedTuple):
    """A weight [V, D] in int8: ``numbers * scale[:, None]``.

    numbers: int8 [V, D], contiguous, from -127 to 127.
    scale: float32 [V].
    """

    numbers: Tensor
    scale: Tensor


@torch.no_grad()
def quantize_rows(weight: Tensor, *, impl: Impl = "auto") -> QuantizedRows:
    """Round each row of a weight to whole multiples of ``scale = max |row| / 127``.

    A row of zeros, or of numbers below 1e-30, has the scale 0. One with NaN or infinity has a scale
    that is not finite, and so do its products.

    Args:
        weight: [V, D], float32, bfloat16 or float16, of any strides.
        impl: "auto", "reference", or a compiled implementation (ppo_fast.ops.backends.dispatch).

    Raises:
        TypeError: another dtype.
        ValueError: another number of dimensions.
    """
    if weight.dtype not in (torch.float32, *HALF):
        raise TypeError(f"weight: got {weight.dtype}, expected float32, bfloat16 or float16")
    if weight.ndim != 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected [V, D]")
    if choose("quantize_rows", impl, weight.device).impl == "reference":
        return QuantizedRows(*reference.quantize_rows(weight))
    return QuantizedRows(*library.quantize_rows["cpp"](weight.detach()))
