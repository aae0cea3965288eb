"""Programs of a grid run in any order, and their addresses do not overflow."""

from __future__ import annotations

import pytest
from interpreted import (
    assert_same_bits,
    backwards,
    example_of,
    needs_interpreter,
    outputs,
    overflow_checked,
    variants,
)
from placed import far_apart, spread
from torch import Tensor
from triton_cases import CASES

pytestmark = needs_interpreter


@pytest.mark.parametrize(("name", "dtype"), variants())
def test_programs_may_run_in_any_order(name, dtype):
    launcher, arguments = CASES[name].prepare(example_of(CASES[name], dtype))
    expected = outputs(launcher, arguments)
    with backwards():
        assert_same_bits(outputs(launcher, arguments), expected)


def columns_far_apart(cache: Tensor) -> Tensor:
    """Return a copy of [n, L, K, d] whose columns and rows have offsets beyond int32."""
    columns, size = cache.shape[1], cache.shape[3]
    return spread(cache, (columns * 2**28, 2**28, size, 1))


@pytest.mark.parametrize(("name", "dtype"), variants())
def test_no_int32_overflows(name, dtype):
    launcher, arguments = CASES[name].prepare(example_of(CASES[name], dtype, aligned=True))
    expected = outputs(launcher, arguments)
    first, *others = arguments
    if name.startswith(("logprobs", "sample")):
        first = far_apart(first, 2**31 + first.shape[1])  # rows split alike at 16 bytes
    if name.startswith("decode_attention"):
        others = [columns_far_apart(x) if x.ndim == 4 else x for x in others[:2]] + others[2:]
    with overflow_checked():
        assert_same_bits(outputs(launcher, (first, *others)), expected)
