"""The specification of ``quantize_rows``, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_SIZE = 1e-30  # 127 / a smaller number would be infinite


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return round(weight / scale) in int8 and scale = max |row| / 127, in float32.

    LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), section 2.1: absmax quantisation, of rows.
    Ties are rounded to even.
    """
    weight = weight.float()
    size = weight.abs().amax(dim=1) if weight.shape[1] else weight.new_zeros(len(weight))
    usable = size.isfinite() & (size >= LEAST_SIZE)
    factor = torch.where(usable, torch.full_like(size, 127.0) / size, 0.0)
    numbers = (weight.nan_to_num(0.0, 0.0, 0.0) * factor[:, None]).round().to(torch.int8)
    return numbers.contiguous(), torch.where(size < LEAST_SIZE, 0.0, size / 127)
