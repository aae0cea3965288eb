"""Weights in int8: the nearest whole multiples of a scale for each row."""

from __future__ import annotations

import pytest
import torch
from runnable import implementations

from ppo_fast.ops import _C, quantize_rows

pytestmark = pytest.mark.parametrize("impl", implementations("quantize_rows"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layouts(weight):
    """Return the weight, parts of it, and its transposed, as GPT-2's are stored."""
    return [weight, weight[:, 3:-4], weight[::2], weight.T.contiguous().T, weight.T]


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_the_nearest(impl, dtype):
    for shape in ((41, 77), (3, 8), (16, 16), (17, 600)):
        for weight in layouts(torch.randn(shape).to(dtype)):
            numbers, scale = quantize_rows(weight, impl=impl)
            assert (numbers.dtype, scale.dtype) == (torch.int8, torch.float32)
            assert numbers.is_contiguous()
            wide = weight.double()
            torch.testing.assert_close(scale.double(), wide.abs().amax(1) / 127, rtol=1e-6, atol=0)
            assert numbers.abs().amax(1).eq(127).all()
            error = (numbers.double() * scale.double()[:, None] - wide).abs()
            assert (error <= 0.5001 * scale.double()[:, None]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", _C.instruction_sets())
def test_every_instruction_set_gives_the_references_bits(impl, dtype, isa):
    if impl == "reference":
        pytest.skip("it is what others are compared with")
    default = _C.instruction_set()
    _C.use_instruction_set(isa)
    try:
        for weight in layouts(torch.randn(41, 601).to(dtype)):
            expected = quantize_rows(weight, impl="reference")
            found = quantize_rows(weight, impl=impl)
            assert all(map(torch.equal, found, expected))
    finally:
        _C.use_instruction_set(default)


def test_the_number_of_threads_changes_nothing(impl):
    weight, threads = torch.randn(500, 601), torch.get_num_threads()
    expected = quantize_rows(weight, impl=impl)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert all(map(torch.equal, quantize_rows(weight, impl=impl), expected))
    finally:
        torch.set_num_threads(threads)


def test_rows_of_zeros_and_of_tiny_numbers(impl):
    weight = torch.randn(4, 33)
    weight[1], weight[2] = 0.0, 1e-38
    numbers, scale = quantize_rows(weight, impl=impl)
    assert (numbers[1:3] == 0).all()
    assert scale[1:3].tolist() == [0.0, 0.0]
    assert (scale[[0, 3]] > 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_show(impl, bad):
    weight = torch.randn(3, 33)
    weight[1, 7] = bad
    scale = quantize_rows(weight, impl=impl).scale
    assert scale.isfinite().tolist() == [True, False, True]


def test_empty_weights(impl):
    assert quantize_rows(torch.empty(0, 5), impl=impl).numbers.shape == (0, 5)
    assert quantize_rows(torch.empty(3, 0), impl=impl).scale.tolist() == [0.0] * 3


def test_raw_op(impl):
    if impl == "cpp":
        torch.library.opcheck(torch.ops.ppo_fast.quantize_rows_cpp.default, (torch.randn(5, 8),))


def test_what_is_refused(impl):
    with pytest.raises(TypeError, match=r"weight: got torch.float64, expected float32"):
        quantize_rows(torch.zeros(2, 3, dtype=torch.float64), impl=impl)
    with pytest.raises(ValueError, match=r"weight: got shape \(2,\), expected \[V, D\]"):
        quantize_rows(torch.zeros(2), impl=impl)
