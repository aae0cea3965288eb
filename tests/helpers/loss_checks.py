"""Helpers of the tests of kl_estimate, ppo_loss, value_loss and whiten."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from runnable import WIDE, generator, implementations
from torch import Tensor


def compiled(op: str) -> list:
    """Return the parameters of ``impl`` other than the reference."""
    return [impl for impl in implementations(op) if impl.values != ("reference",)]


def tolerance(double: float, single: float) -> float:
    """Return the tolerance for the dtype WIDE."""
    return {torch.float64: double, torch.float32: single}[WIDE]


def programs_take_several_blocks(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit the programs of a Triton kernel, so that one takes several blocks of a small batch."""
    if impl == "triton":
        monkeypatch.setattr("ppo_fast.ops.backends.triton_reduce.MAX_PROGRAMS", 4)


def padded_mask(num_rows: int, num_steps: int) -> Tensor:
    """Return a mask with full rows, empty rows, rows of one token, gaps, and padding at the end."""
    g = generator(3)
    mask = torch.rand(num_rows, num_steps, generator=g) < 0.8
    ends = torch.randint(num_steps + 1, (num_rows, 1), generator=g)
    mask &= torch.arange(num_steps) < ends
    mask[0], mask[1] = True, False
    mask[2] = torch.arange(num_steps) == num_steps // 2
    return mask


def assert_same_bits_with_any_number_of_threads(run: Callable[[], tuple[Tensor, ...]]) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run()
        for count in (2, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, run(), expected))
    finally:
        torch.set_num_threads(before)
