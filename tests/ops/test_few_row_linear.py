from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from logprob_truth import assert_within_budget
from runnable import implementations
from torch._subclasses.fake_tensor import FakeTensorMode

from ppo_fast.ops import _C, quantize_rows
from ppo_fast.ops.few_row_linear import few_row_linear
from ppo_fast.ops.few_row_linear.api import MOST_ROWS

pytestmark = pytest.mark.parametrize("impl", implementations("few_row_linear"))

# Inputs, outputs, rows: of tails alone, of whole steps alone, of both; of one tile of rows and of
# several; of more outputs than a tile.
SIZES = ((1, 3, 2), (31, 41, 1), (64, 100, 4), (77, 100, 3), (576, 50, 9), (77, 0, 2))


@settings(max_examples=50)
@given(
    lead=st.sampled_from([(), (0,), (1,), (3,), (16,), (2, 1), (2, 3), (2, 0)]),
    v=st.sampled_from([1, 2, 41, 507]),
    d=st.sampled_from([1, 8, 33]),
    with_bias=st.booleans(),
    layout=st.sampled_from(["contiguous", "last position", "transposed weight"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_against_float64(impl, lead, v, d, with_bias, layout, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, d, generator=generator).to(dtype)
    weight = torch.randn(v, d, generator=generator).to(dtype)
    bias = torch.randn(v, generator=generator).to(dtype) if with_bias else None
    if layout == "last position":
        x = torch.stack([x, x], -2)[..., -1, :]
    if layout == "transposed weight":
        weight = weight.t().contiguous().t()
    given = [x, weight] if bias is None else [x, weight, bias]
    given = [g.detach().requires_grad_() for g in given]
    out = few_row_linear(*given, impl=impl)
    assert out.dtype == dtype
    assert out.is_contiguous()
    upstream = torch.randn(*lead, v, generator=generator).to(dtype)
    grads = torch.autograd.grad(out, given, upstream)
    by_hand = [g.detach().requires_grad_() for g in given]
    eager = F.linear(*by_hand)
    eager_grads = torch.autograd.grad(eager, by_hand, upstream)

    x64, w64, g64 = x.double().reshape(-1, d), weight.double(), upstream.double().reshape(-1, v)
    true = x64 @ w64.T + (bias.double() if with_bias else 0)
    truths = (true.view(*lead, v), (g64 @ w64).view(*lead, d), g64.T @ x64, g64.sum(0))
    for got, hand, expected in zip((out, *grads), (eager, *eager_grads), truths, strict=False):
        assert_within_budget(got, hand, expected)


def test_gradcheck(impl):
    if impl != "reference":
        pytest.skip("finite differences are for the float64 reference")
    operands = [torch.randn(*s, dtype=torch.float64) for s in ((2, 3, 4), (5, 4), (5,))]
    operands = [x.requires_grad_() for x in operands]
    assert torch.autograd.gradcheck(lambda *o: few_row_linear(*o, impl=impl), operands)


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_gradient_of_one_operand_alone(impl, trained):
    operands = [torch.randn(3, 8), torch.randn(41, 8), torch.randn(41)]
    operands[trained].requires_grad_()
    upstream = torch.randn(3, 41)
    (got,) = torch.autograd.grad(few_row_linear(*operands, impl=impl), operands[trained], upstream)
    (expected,) = torch.autograd.grad(F.linear(*operands), operands[trained], upstream)
    torch.testing.assert_close(got, expected)


def test_compiles_as_one_graph(impl):
    compiled = torch.compile(few_row_linear, fullgraph=True, backend="aot_eager")
    operands = torch.randn(3, 8), torch.randn(41, 8), torch.randn(41)
    torch.testing.assert_close(compiled(*operands, impl=impl), F.linear(*operands))


def test_runs_on_meta_and_fake_tensors(impl):
    if impl == "reference":
        x, weight = torch.randn(2, 3, 8, device="meta"), torch.randn(41, 8, device="meta")
        assert few_row_linear(x, weight, impl=impl).shape == (2, 3, 41)
    with FakeTensorMode():
        assert few_row_linear(torch.randn(3, 8), torch.randn(41, 8), impl=impl).shape == (3, 41)


@contextmanager
def instruction_set(name):
    default = _C.instruction_set()
    _C.use_instruction_set(name)
    try:
        yield
    finally:
        _C.use_instruction_set(default)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", _C.instruction_sets())
def test_a_weight_in_half_precision(impl, half, isa):
    """A float32 x is rounded to the weight's dtype; sums and y are float32."""
    if impl == "reference" and isa != _C.instruction_set():
        pytest.skip("products of the BLAS")
    for d, v, rows in SIZES:
        x, weight, bias = torch.randn(rows, d), torch.randn(v, d).to(half), torch.randn(v)
        strided = torch.randn(v, d + 7).to(half)[:, 3:-4]
        for w, b in ((weight, None), (weight, bias), (strided, bias)):
            with instruction_set(isa):
                y = few_row_linear(x, w, b, impl=impl)
            assert y.dtype == torch.float32
            rounded, shift = x.to(half), torch.zeros(v) if b is None else b
            true = rounded.double() @ w.double().T + shift.double()
            assert_within_budget(y, F.linear(rounded.float(), w.float(), shift), true)


def test_gradients_beside_a_weight_in_half_precision(impl):
    x, bias = torch.randn(3, 40, requires_grad=True), torch.randn(41, requires_grad=True)
    weight = torch.randn(41, 40).bfloat16().requires_grad_()
    upstream = torch.randn(3, 41)
    operands = (x, weight, bias)
    grads = torch.autograd.grad(few_row_linear(*operands, impl=impl), operands, upstream)
    wide = [x.bfloat16().float(), weight.float(), bias]
    wide = [w.detach().requires_grad_() for w in wide]
    expected = torch.autograd.grad(F.linear(*wide), wide, upstream)
    # the gradient of what is in half precision is rounded to it, in the reference that of x too
    for grad, other, tolerance in zip(grads, expected, (1e-2, 1e-2, 1e-5), strict=True):
        torch.testing.assert_close(grad.float(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("isa", _C.instruction_sets())
def test_a_weight_in_int8(impl, isa):
    """It stands for its numbers times the scales of their rows; x is not rounded."""
    if impl == "reference" and isa != _C.instruction_set():
        pytest.skip("products of the BLAS")
    for d, v, rows in SIZES:
        x, weight, bias = torch.randn(rows, d), torch.randn(v, d), torch.randn(v)
        weight *= torch.logspace(-3, 3, v)[:, None]
        numbers, scale = quantize_rows(weight)
        padded = torch.randint(-127, 128, (v, d + 7), dtype=torch.int8)
        for w, b in ((numbers, None), (numbers, bias), (padded[:, 3:-4], bias)):
            with instruction_set(isa):
                y = few_row_linear(x, w, b, scale=scale, impl=impl)
            assert y.dtype == torch.float32
            shift = torch.zeros(v) if b is None else b
            true = x.double() @ (w.double() * scale.double()[:, None]).T + shift.double()
            eager = F.linear(x, w.float()) * scale + shift
            assert_within_budget(y, eager, true)


def test_gradients_beside_a_weight_in_int8(impl):
    x, bias = torch.randn(3, 40, requires_grad=True), torch.randn(41, requires_grad=True)
    numbers, scale = quantize_rows(torch.randn(41, 40))
    upstream = torch.randn(3, 41)
    y = few_row_linear(x, numbers, bias, scale=scale, impl=impl)
    grads = torch.autograd.grad(y, (x, bias), upstream)
    expected = (upstream @ (numbers * scale[:, None]), upstream.sum(0))
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PAIRS = [*((d, d) for d in DTYPES), *((torch.float32, d) for d in (*DTYPES[2:], torch.int8))]


@pytest.mark.parametrize(("dtype", "of_weight"), PAIRS)
@pytest.mark.parametrize("isa", _C.instruction_sets())
def test_a_rows_bits_depend_on_the_row_alone(impl, dtype, of_weight, isa):
    """The bits do not depend on the other rows, on their number, or on the number of threads."""
    if impl == "reference":
        pytest.skip("products of the BLAS")
    x, weight, scale = torch.randn(11, 77).to(dtype), torch.randn(100, 77), None
    if of_weight == torch.int8:
        weight, scale = quantize_rows(weight)
    weight = weight.to(of_weight)
    threads = torch.get_num_threads()
    try:
        with instruction_set(isa):
            expected = few_row_linear(x, weight, scale=scale, impl=impl)
            for rows in ([0], [10, 3], [4, 5, 6], list(range(11))[::-1]):
                for count in (1, 2, 5):
                    torch.set_num_threads(count)
                    found = few_row_linear(x[rows], weight, scale=scale, impl=impl)
                    assert torch.equal(found, expected[rows])
    finally:
        torch.set_num_threads(threads)


def test_rows_of_the_weight_may_be_strided(impl):
    x, weight = torch.randn(5, 33), torch.randn(80, 70)
    for part in (weight[:, :33], weight[::2, 37:], weight[3:4, :33]):
        expected = few_row_linear(x, part.contiguous(), impl=impl)
        torch.testing.assert_close(few_row_linear(x, part, impl=impl), expected)


def test_raw_op(impl):
    if impl == "cpp":
        op = torch.ops.ppo_fast.few_row_linear_cpp.default
        for bias in (None, torch.randn(41)):
            torch.library.opcheck(op, (torch.randn(2, 3, 8), torch.randn(41, 8), bias, None))
        numbers, scale = quantize_rows(torch.randn(41, 8))
        torch.library.opcheck(op, (torch.randn(2, 3, 8), numbers, None, scale))


def test_auto_uses_the_blas_for_many_rows(impl, monkeypatch):
    from ppo_fast.ops.backends import library

    calls = []
    kernel = library.few_row_linear["cpp"]
    counted = {"cpp": lambda *operands: calls.append(1) or kernel(*operands)}
    monkeypatch.setattr(library, "few_row_linear", counted)
    weight = torch.randn(41, 8)
    for rows in (1, MOST_ROWS, MOST_ROWS + 1):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(few_row_linear(x, weight), F.linear(x, weight))
    assert len(calls) == 2
    assert few_row_linear(x, weight.bfloat16()).dtype == torch.float32
    assert len(calls) == 3, "the BLAS has no product of two dtypes"


@pytest.mark.parametrize(
    ("x", "weight", "scale", "error", "message"),
    [
        (
            torch.float32,
            torch.int8,
            None,
            ValueError,
            "scale: got None with a weight in torch.int8",
        ),
        (torch.float32, torch.float32, 5, ValueError, "scale: got a tensor with a weight in"),
        (torch.float32, torch.int8, 4, ValueError, r"scale: got torch.float32 \(4,\), expected"),
        (torch.bfloat16, torch.int8, 5, TypeError, "weight: got torch.int8, expected torch.bfloat"),
    ],
)
def test_scales_that_do_not_fit(impl, x, weight, scale, error, message):
    scale = None if scale is None else torch.ones(scale)
    with pytest.raises(error, match=message):
        few_row_linear(
            torch.zeros(2, 3, dtype=x), torch.zeros(5, 3, dtype=weight), scale=scale, impl=impl
        )


X, WEIGHT = torch.zeros(2, 3), torch.zeros(5, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.long(), WEIGHT), TypeError, "x: got torch.int64"),
        ((X, WEIGHT.double()), TypeError, "weight: got torch.float64, expected torch.float32"),
        ((X, WEIGHT, WEIGHT[:, 0].half()), TypeError, "bias: got torch.float16"),
        ((X.double(), WEIGHT.half()), TypeError, "weight: got torch.float16"),
        ((X.half(), WEIGHT), TypeError, "weight: got torch.float32, expected torch.float16"),
        ((X, WEIGHT[0]), ValueError, r"weight: got shape \(3,\)"),
        ((X, WEIGHT.T), ValueError, r"x: got shape \(2, 3\), expected \[\.\.\., 5\]"),
        ((X, WEIGHT, WEIGHT[0]), ValueError, r"bias: got shape \(3,\), expected \(5,\)"),
        ((X, WEIGHT.to("meta")), ValueError, "weight: is on meta, expected cpu"),
    ],
)
def test_errors_name_the_argument(impl, arguments, error, message):
    with pytest.raises(error, match=message):
        few_row_linear(*arguments, impl=impl)
