"""whiten against exact rational statistics, and on inputs that lose digits or have variance 0."""

from __future__ import annotations

import importlib
import math
import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_checks import assert_same_bits_with_any_number_of_threads, padded_mask
from runnable import TRITON, WIDE, examples, generator, implementations
from torch._subclasses.fake_tensor import FakeTensorMode

from ppo_fast.ops.whiten import api, whiten

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-5} | ({} if TRITON else {torch.float64: 1e-12})
ROUNDING = 1e-6 if TRITON else 1e-14  # by the dtype WIDE
DTYPES = [torch.float32] if TRITON else [torch.float32, torch.float64]

each_impl = pytest.mark.parametrize("impl", implementations("whiten"))
each_kernel = pytest.mark.parametrize(
    "impl", [x for x in implementations("whiten") if x.values != ("reference",)]
)


@pytest.fixture
def small_blocks(monkeypatch):
    """Make the Triton kernels' blocks small, so that a few tokens are many blocks."""
    if TRITON:
        kernels = importlib.import_module("ppo_fast.ops.whiten.triton")
        monkeypatch.setattr(kernels, "TOKENS", kernels.TOKENS._replace(block=32, num_warps=1))
        monkeypatch.setattr(kernels, "MERGED", 4)


def batch(seed=0, B=3, T=5, dtype=WIDE, valid=0.7):
    g = generator(seed)
    values = torch.randn(B, T, generator=g, dtype=torch.float64).to(dtype)
    return values, torch.rand(B, T, generator=g) < valid


def truth(values, mask):
    out = torch.zeros(values.shape, dtype=torch.float64)
    tokens = [Fraction(x) for x in values[mask].tolist()]
    if len(tokens) > 1:
        mean, variance = statistics.mean(tokens), statistics.variance(tokens)
        scale = 1 / math.sqrt(variance + Fraction(1e-8))
        for b, t in mask.nonzero().tolist():
            out[b, t] = float(Fraction(values[b, t].item()) - mean) * scale
    return out


@each_impl
@settings(deadline=None, max_examples=examples(60))
@given(
    seed=st.integers(0, 10**6),
    B=st.integers(0, 3),
    T=st.integers(0, 7),
    valid=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_value(impl, seed, B, T, valid, scale, dtype):
    values, mask = batch(seed, B, T, dtype, valid)
    values = values * scale
    out = whiten(values, mask=mask, impl=impl)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out.double(), truth(values, mask), rtol=0, atol=TOLERANCE[dtype])


@each_impl
@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_a_common_offset_costs_no_more_than_its_rounding(impl, offset):
    """E[x^2] - E[x]^2 in float32 would lose all digits of the variance, which is 1 here."""
    values, mask = batch(B=7, T=63, dtype=torch.float32)
    values = values + offset
    torch.testing.assert_close(
        whiten(values, mask=mask, impl=impl).double(), truth(values, mask), rtol=0, atol=1e-5
    )


@each_impl
def test_the_rounding_error_of_the_mean_is_corrected(impl):
    """Rounding the mean of such numbers gives an error of a thousandth of their spread."""
    values, mask = batch(B=7, T=63)
    values = values + (2e4 if TRITON else 1e13)
    out = whiten(values, mask=mask, impl=impl)
    torch.testing.assert_close(out.double(), truth(values, mask), rtol=0, atol=TOLERANCE[WIDE])


@each_impl
def test_equal_values_whiten_to_zero(impl):
    """The mean's rounding error must not be scaled up to variance 1."""
    values = torch.full((5, 77), 123456.7)
    out = whiten(values, mask=torch.rand(5, 77) < 0.7, impl=impl)
    assert out.abs().max() < 1e-3


@each_impl
@pytest.mark.parametrize("tokens", [0, 1])
def test_nothing_to_whiten_gives_zeros(impl, tokens):
    values = torch.tensor([[7.5, -2.0, math.nan]], requires_grad=True)
    mask = torch.tensor([[tokens == 1, False, False]])
    out = whiten(values, mask=mask, impl=impl)
    assert torch.equal(out, torch.zeros(1, 3))
    out.backward(torch.randn(1, 3))
    assert torch.equal(values.grad, torch.zeros(1, 3))


@each_impl
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e38])
def test_masked_values_do_not_reach_output_or_gradient(impl, poison):
    values, mask = batch(dtype=torch.float32)
    values.requires_grad_()
    dirty = values.detach().masked_fill(~mask, poison).requires_grad_()
    upstream = torch.randn(3, 5)
    clean_out, out = whiten(values, mask=mask, impl=impl), whiten(dirty, mask=mask, impl=impl)
    clean_out.backward(upstream)
    out.backward(upstream)
    assert torch.equal(out, clean_out)
    assert torch.equal(dirty.grad, values.grad)
    assert (out[~mask] == 0).all()
    assert (dirty.grad[~mask] == 0).all()


@pytest.mark.parametrize("impl", [x for x in implementations("whiten") if not TRITON])
def test_gradient(impl):
    values, mask = batch()
    torch.autograd.gradcheck(lambda x: whiten(x, mask=mask, impl=impl), values.requires_grad_())


@each_impl
def test_strided_inputs(impl):
    values, mask = batch(B=4, T=6)
    out = whiten(values.T[::2], mask=mask.T[::2], impl=impl)
    dense = whiten(values.T[::2].contiguous(), mask=mask.T[::2].contiguous(), impl=impl)
    torch.testing.assert_close(out, dense, rtol=0, atol=ROUNDING)


@each_impl
def test_padding_does_not_matter(impl):
    values, mask = batch()
    padded = torch.cat([values, torch.full((3, 4), 9.0)], dim=1)
    longer = torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], dim=1)
    out = whiten(padded, mask=longer, impl=impl)[:, :5]
    torch.testing.assert_close(out, whiten(values, mask=mask, impl=impl), rtol=0, atol=ROUNDING)


def test_on_meta_tensors():
    values, mask = batch()
    assert whiten(values.to("meta"), mask=mask.to("meta")).shape == values.shape


@each_impl
def test_compiles_as_one_graph(impl):
    values, mask = batch()
    values.requires_grad_()
    upstream = torch.randn(3, 5, dtype=WIDE)
    outcomes = []
    for run in (torch.compile(whiten, fullgraph=True, backend="aot_eager"), whiten):
        out = run(values, mask=mask, impl=impl)
        outcomes.append((out, torch.autograd.grad(out, values, upstream)[0]))
    for compiled, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(compiled, plain)


def run_all(values, mask, impl, upstream):
    values = values.detach().requires_grad_()
    out = whiten(values, mask=mask, impl=impl)
    return out.detach(), torch.autograd.grad(out, values, upstream)[0]


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_longer_than_what_the_kernel_takes_at_once(impl, dtype):
    values, mask = batch(B=6, T=1100, dtype=dtype)[0] * 3 + 5, padded_mask(6, 1100)
    upstream = batch(seed=1, B=6, T=1100, dtype=dtype)[0]
    wide = run_all(values.double(), mask, "reference", upstream.double())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for x, y in zip(run_all(values, mask, impl, upstream), wide, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


@each_impl
@pytest.mark.parametrize("case", ["plain", "offset", "rows far apart", "outlier", "equal rows"])
def test_error_budget(impl, case, small_blocks):
    """err(impl) <= 2 err(eager in float32) + a few eps, both against float64: more blocks of the
    Triton kernels than are merged at once, some without a valid token."""
    values, upstream = torch.randn(2, 12, 41, generator=generator(0))
    mask = padded_mask(12, 41)
    if case == "offset":
        values += 1e4
        upstream += 100
    if case == "rows far apart":
        values += 1e3 * torch.arange(12.0)[:, None]
    if case == "outlier":
        values[0, 0] = -1e6
    if case == "equal rows":
        values = torch.randn(12, 1, generator=generator(0)).expand(12, 41) + 0.1
    truth = run_all(values.double(), mask, "reference", upstream.double())
    eager = run_all(values, mask, "reference", upstream)
    for got, own, exact in zip(run_all(values, mask, impl, upstream), eager, truth, strict=True):
        budget = 2 * (own - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs()
        assert ((got - exact).abs() <= budget).all()
        assert (got[~mask] == 0).all()


@each_kernel
def test_incoming_gradients_at_masked_tokens_are_ignored(impl):
    values, mask = batch()
    upstream = torch.randn(3, 5, dtype=WIDE)
    clean = run_all(values, mask, impl, upstream)
    dirty = run_all(values, mask, impl, upstream.masked_fill(~mask, math.nan))
    assert torch.equal(clean[1], dirty[1])


@each_impl
def test_backward_twice(impl):
    values, mask = batch()
    values.requires_grad_()
    upstream = torch.randn(3, 5, dtype=WIDE)
    out = whiten(values, mask=mask, impl=impl)
    (one,) = torch.autograd.grad(out, values, upstream, retain_graph=True)
    (other,) = torch.autograd.grad(out, values, -2 * upstream)
    assert torch.equal(-2 * one, other)


@each_impl
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(impl, half):
    values, mask = batch(dtype=half)
    values.requires_grad_()
    out = whiten(values, mask=mask, impl=impl)
    assert torch.equal(out, whiten(values.detach().float(), mask=mask, impl=impl))
    out.backward(torch.randn(3, 5))
    assert values.grad.dtype == half


@each_impl
def test_no_graph_without_a_gradient(impl):
    values, mask = batch()
    assert not whiten(values, mask=mask, impl=impl).requires_grad
    with torch.no_grad():
        assert not whiten(values.requires_grad_(), mask=mask, impl=impl).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_do_not_depend_on_threads(dtype):
    values, mask = batch(B=37, T=1400, dtype=dtype)[0], padded_mask(37, 1400)
    upstream = batch(seed=1, B=37, T=1400, dtype=dtype)[0]
    assert_same_bits_with_any_number_of_threads(lambda: run_all(values, mask, "cpp", upstream))


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(impl, dtype):
    values, mask = batch(dtype=dtype)
    forward = getattr(torch.ops.ppo_fast, f"whiten_{impl}").default
    backward = getattr(torch.ops.ppo_fast, f"whiten_backward_{impl}").default
    torch.library.opcheck(forward, (values.T[::2], mask.T[::2]))
    whitened, scale = forward(values, mask)
    torch.library.opcheck(backward, (values, whitened, mask, scale))


def test_raw_ops_check_the_arguments_of_the_kernels():
    x = torch.ones(2, 3)
    whitened, scale = torch.ops.ppo_fast.whiten_cpp.default(x, x > 0)
    with pytest.raises(ValueError, match="mask: got"):
        torch.ops.ppo_fast.whiten_cpp.default(x, x)
    for name, arguments in {
        "grad_whitened": (x.double(), whitened, x > 0, scale),
        "mask": (x, whitened, x[:1] > 0, scale),
        "scale": (x, whitened, x > 0, scale.float()),
    }.items():
        with pytest.raises(ValueError, match=f"{name}: got"):
            torch.ops.ppo_fast.whiten_backward_cpp.default(*arguments)


@each_impl
def test_fake_tensors_and_autocast(impl):
    values, mask = batch(dtype=torch.float32)
    with torch.autocast(values.device.type, dtype=torch.bfloat16):
        inside = whiten(values, mask=mask, impl=impl)
    assert torch.equal(inside, whiten(values, mask=mask, impl=impl))
    with FakeTensorMode():
        x = torch.zeros(3, 5, requires_grad=True)
        whiten(x, mask=x > 0, impl=impl).sum().backward()
    assert x.grad.shape == (3, 5)


def test_auto_is_cpp_on_the_cpu(monkeypatch):
    monkeypatch.setattr(api.reference, "whiten", None)
    whiten(*batch()[:1], mask=batch()[1])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"mask": torch.ones(3, 5, dtype=torch.long)}, TypeError, "mask is torch.int64"),
        (
            {"mask": torch.ones(3, 1, dtype=torch.bool)},
            ValueError,
            r"values \[3, 5\], mask \[3, 1\]",
        ),
        (
            {"values": torch.ones(1, 2, 5), "mask": torch.ones(1, 2, 5, dtype=torch.bool)},
            ValueError,
            r"expected one shape \[B, T\], or \[total\],.*values \[1, 2, 5\]",
        ),
        ({"values": torch.ones(3, 5, dtype=torch.long)}, TypeError, r"values.float\(\)"),
        ({"impl": "numpy"}, ValueError, "numpy"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"mask": torch.ones(3, 5, dtype=torch.bool), "values": torch.ones(3, 5), **change}
    with pytest.raises(error, match=words):
        whiten(arguments.pop("values"), **arguments)
