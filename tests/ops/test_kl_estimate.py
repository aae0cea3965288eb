"""kl_estimate against its formulas token by token, and its expectation against the exact KL."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_checks import (
    assert_same_bits_with_any_number_of_threads,
    compiled,
    padded_mask,
    tolerance,
)
from runnable import FLOATS, WIDE, examples, generator, implementations
from torch._subclasses.fake_tensor import FakeTensorMode

from ppo_fast.ops.kl_estimate import api, kl_estimate

VALUE = {
    "k1": lambda d: d,
    "abs": abs,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(-d) - 1 + d,
    "k1+k2": lambda d: d,
}
SLOPE = {
    "k1": lambda d: 1.0,
    "abs": lambda d: float((d > 0) - (d < 0)),
    "k2": lambda d: d,
    "k3": lambda d: 1 - math.exp(-d),
    "k1+k2": lambda d: d,
}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 3e-6}

each_impl = pytest.mark.parametrize("impl", implementations("kl_estimate"))
each_estimator = pytest.mark.parametrize("estimator", list(VALUE))


def batch(seed=0, B=3, T=5, dtype=WIDE, valid=0.7):
    g = generator(seed)
    logprobs, ref, upstream = torch.randn(3, B, T, generator=g, dtype=torch.float64).unbind()
    mask = torch.rand(B, T, generator=g) < valid
    upstream = upstream.to(WIDE)
    return logprobs.to(dtype).requires_grad_(), ref.to(dtype).requires_grad_(), mask, upstream


@each_impl
@each_estimator
@settings(deadline=None, max_examples=examples(25))
@given(
    seed=st.integers(0, 10**6),
    B=st.integers(0, 3),
    T=st.integers(0, 7),
    valid=st.sampled_from([0.0, 0.5, 1.0]),
    masked=st.booleans(),
    dtype=st.sampled_from([dtype for dtype in TOLERANCE if dtype in FLOATS]),
)
def test_value_and_gradients(impl, estimator, seed, B, T, valid, masked, dtype):
    logprobs, ref, mask, upstream = batch(seed, B, T, dtype, valid)
    if not masked:
        mask = torch.ones_like(mask)
    out = kl_estimate(logprobs, ref, mask=mask if masked else None, estimator=estimator, impl=impl)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    out.backward(upstream.to(out.dtype))

    value, slope = torch.zeros(2, B, T, dtype=torch.float64)
    for b, t in mask.nonzero().tolist():
        d = logprobs[b, t].item() - ref[b, t].item()
        value[b, t], slope[b, t] = VALUE[estimator](d), SLOPE[estimator](d)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    stored = {"rtol": 2**-8, "atol": 1e-6} if dtype == torch.bfloat16 else close
    torch.testing.assert_close(out.double(), value, **close)
    torch.testing.assert_close(logprobs.grad.double(), slope * upstream, **stored)
    if estimator == "k1+k2":
        assert ref.grad is None
    else:
        torch.testing.assert_close(ref.grad.double(), -slope * upstream, **stored)


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
def test_gradcheck_of_the_reference(estimator):
    logprobs, ref, mask, _ = batch()
    away_from_the_kink = torch.where(ref > logprobs, 0.5, -0.5)
    ref = (ref + away_from_the_kink).detach().requires_grad_()
    torch.autograd.gradcheck(
        lambda x, y: kl_estimate(x, y, mask=mask, estimator=estimator, impl="reference"),
        (logprobs, ref),
    )


@each_impl
@each_estimator
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_values_do_not_reach_estimate_or_gradients(impl, estimator, poison):
    logprobs, ref, mask, upstream = batch(dtype=torch.float32)
    with torch.no_grad():
        logprobs[~mask], ref[~mask] = -poison, poison
    out = kl_estimate(logprobs, ref, mask=mask, estimator=estimator, impl=impl)
    out.backward(upstream.float())
    assert (out[~mask] == 0).all()
    assert (logprobs.grad[~mask] == 0).all()
    assert out.isfinite().all()
    assert logprobs.grad.isfinite().all()
    if estimator != "k1+k2":
        assert (ref.grad[~mask] == 0).all()


@each_impl
@each_estimator
def test_expectations_by_enumeration(impl, estimator):
    """The expectation over a small vocabulary shows which estimators have the value of the KL, and
    which its gradient."""
    logits, ref_logits = torch.randn(2, 1, 6, generator=generator(1), dtype=WIDE).unbind()
    logits.requires_grad_()
    logprobs, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    p = logprobs.detach().exp()
    kl = (logprobs.exp() * (logprobs - ref)).sum()
    (true_gradient,) = torch.autograd.grad(kl, logits, retain_graph=True)

    expected = (p * kl_estimate(logprobs, ref, estimator=estimator, impl=impl)).sum()
    (gradient,) = torch.autograd.grad(expected, logits)
    limit = tolerance(1e-14, 4e-7)  # float32: of numbers near 1, three ulps
    if estimator in ("k1", "k3", "k1+k2"):
        torch.testing.assert_close(expected, kl, rtol=tolerance(1e-12, 1e-5), atol=0)
    if estimator in ("k2", "k1+k2"):
        torch.testing.assert_close(gradient, true_gradient, rtol=0, atol=limit)
    if estimator == "k1":
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=limit)


@each_impl
@each_estimator
def test_equal_policies_give_exactly_zero(impl, estimator):
    logprobs = batch(dtype=torch.float32)[0]
    out = kl_estimate(logprobs, logprobs.detach(), estimator=estimator, impl=impl)
    assert (out == 0).all()
    out.sum().backward()
    assert (logprobs.grad == (1 if estimator == "k1" else 0)).all()


@each_impl
def test_k3_near_zero_is_not_lost_to_rounding(impl):
    """In float32 without expm1, exp(-d) - 1 + d has an error of 6e-8, forty times its value."""
    d = torch.tensor([[5e-5]])
    out = kl_estimate(d, torch.zeros(1, 1), estimator="k3", impl=impl)
    assert out.item() == pytest.approx(VALUE["k3"](5e-5), abs=4e-12)


@pytest.mark.parametrize("impl", compiled("kl_estimate"))
def test_k3_of_any_difference(impl):
    """Compare value and slope over the range where exp is finite in float32."""
    d = torch.cat([torch.linspace(-88.7, 88.7, 999), torch.linspace(-0.5, 0.5, 999)])[None]
    d.requires_grad_()
    out = kl_estimate(d, torch.zeros_like(d), estimator="k3", impl=impl)
    out.sum().backward()
    wide = d.detach().double()
    slope = -torch.expm1(-wide)
    error = (out.double() - (wide - slope)).abs()
    assert (error <= 3e-7 * (slope.abs() + wide.abs())).all()
    assert ((d.grad.double() - slope).abs() <= 3e-7 * slope.abs()).all()


@each_impl
def test_clamped_k3(impl):
    """As verl: d within [-20, 20], then k3 at most 10, and no gradient beyond."""
    d = torch.tensor([[-math.inf, -200, -20.5, -2.7, -2.5, 0, 3, 10.9, 11.1, 90, math.inf]])
    d = d.to(WIDE).requires_grad_()
    out = kl_estimate(d, torch.zeros_like(d), estimator="k3", clamp=True, impl=impl)
    upstream = torch.randn(d.shape, generator=generator(3), dtype=torch.float64).to(WIDE)
    out.backward(upstream)
    inside = (d > -2.6) & (d < 11)
    near = torch.where(inside, d.detach(), 0).double()
    expected = torch.where(inside, torch.expm1(-near) + near, 10.0)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance(1e-13, 1e-6), atol=0)
    slope = torch.where(inside, -torch.expm1(-near), 0.0)
    torch.testing.assert_close(
        d.grad.double(), slope * upstream, rtol=tolerance(1e-13, 1e-6), atol=0
    )
    bad = torch.full((1, 1), math.nan, dtype=WIDE)
    assert kl_estimate(bad, 0 * bad, estimator="k3", clamp=True, impl=impl).isnan().all()
    for name in ("k1", "abs", "k2", "k1+k2"):
        plain = kl_estimate(d[:, 1:-1], d[:, 1:-1] * 0, estimator=name, impl=impl)
        same = kl_estimate(d[:, 1:-1], d[:, 1:-1] * 0, estimator=name, clamp=True, impl=impl)
        assert torch.equal(plain, same)


@each_impl
@each_estimator
def test_strided_inputs(impl, estimator):
    logprobs, ref, mask, _ = (x.detach() for x in batch(B=4, T=6))
    out = kl_estimate(logprobs.T[::2], ref.T[::2], mask=mask.T[::2], estimator=estimator, impl=impl)
    dense = [x.T[::2].contiguous() for x in (logprobs, ref, mask)]
    same = kl_estimate(dense[0], dense[1], mask=dense[2], estimator=estimator, impl=impl)
    assert torch.equal(out, same)


@each_impl
def test_partial_gradients(impl):
    logprobs, ref, mask, upstream = batch()
    kl_estimate(logprobs.detach(), ref, mask=mask, estimator="k3", impl=impl).backward(upstream)
    assert logprobs.grad is None
    assert ref.grad.abs().sum() > 0


@each_estimator
def test_on_meta_tensors(estimator):
    logprobs, ref, mask, _ = (x.detach().to("meta") for x in batch())
    assert kl_estimate(logprobs, ref, mask=mask, estimator=estimator).shape == (3, 5)


@pytest.mark.slow
@each_impl
@each_estimator
def test_compiled(impl, estimator):
    def run(x, y, m):
        return kl_estimate(x, y, mask=m, estimator=estimator, impl=impl)

    logprobs, ref, mask, upstream = batch(dtype=torch.float32)
    torch.compiler.reset()
    out = torch.compile(run, fullgraph=True, backend="aot_eager")(logprobs, ref, mask)
    assert torch.equal(out, run(logprobs, ref, mask))
    (one,) = torch.autograd.grad(out, logprobs, upstream.float())
    (other,) = torch.autograd.grad(run(logprobs, ref, mask), logprobs, upstream.float())
    assert torch.equal(one, other)


@each_impl
@each_estimator
def test_rows_longer_than_what_a_kernel_takes_at_once(impl, estimator):
    logprobs, ref, _, upstream = batch(B=5, T=1100)
    mask = padded_mask(5, 1100)
    out = kl_estimate(logprobs, ref, mask=mask, estimator=estimator, impl=impl)
    out.backward(upstream)
    d = torch.where(mask, (logprobs - ref).detach(), 0)
    for tensor, formula in ((out, VALUE), (logprobs.grad, SLOPE)):
        flat = [formula[estimator](x) for x in d.flatten().tolist()]
        expected = torch.tensor(flat, dtype=torch.float64).reshape(d.shape) * mask
        if tensor is not out:
            expected = expected * upstream
        limit = tolerance(1e-12, 3e-6)
        torch.testing.assert_close(tensor.double(), expected, rtol=limit, atol=limit)


@each_impl
@each_estimator
def test_incoming_gradients_at_masked_tokens_are_ignored(impl, estimator):
    logprobs, ref, mask, upstream = batch()
    out = kl_estimate(logprobs, ref, mask=mask, estimator=estimator, impl=impl)
    out.backward(upstream.masked_fill(~mask, math.nan))
    assert (logprobs.grad[~mask] == 0).all()
    assert logprobs.grad.isfinite().all()


@each_impl
@each_estimator
def test_backward_twice(impl, estimator):
    logprobs, ref, mask, upstream = batch()
    out = kl_estimate(logprobs, ref, mask=mask, estimator=estimator, impl=impl)
    (one,) = torch.autograd.grad(out, logprobs, upstream, retain_graph=True)
    (other,) = torch.autograd.grad(out, logprobs, -2 * upstream)
    assert torch.equal(-2 * one, other)


@each_impl
def test_no_graph_without_a_gradient(impl):
    logprobs, ref, mask, _ = batch()
    with torch.no_grad():
        assert not kl_estimate(logprobs, ref, mask=mask, impl=impl).requires_grad
    constant = logprobs.detach()
    out = kl_estimate(constant, ref, mask=mask, estimator="k1+k2", impl=impl)
    assert not out.requires_grad


@each_impl
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_and_mixed_dtypes(impl, half):
    logprobs, ref, mask, upstream = batch(dtype=half)
    wide = [x.detach().float() for x in (logprobs, ref)]
    out = kl_estimate(logprobs, ref.detach().double(), mask=mask, estimator="k3", impl=impl)
    assert out.dtype == torch.float32
    assert torch.equal(out, kl_estimate(*wide, mask=mask, estimator="k3", impl=impl))
    out.backward(upstream.float())
    assert logprobs.grad.dtype == half


@each_impl
@each_estimator
def test_bits_do_not_depend_on_threads_or_other_rows(impl, estimator):
    B, T = (5, 301) if impl == "triton" else (37, 1400)
    logprobs, ref, mask, _ = batch(B=B, T=T, dtype=torch.float32)

    def run(rows=slice(None)):
        x = logprobs.detach()[rows].requires_grad_()
        out = kl_estimate(x, ref.detach()[rows], mask=mask[rows], estimator=estimator, impl=impl)
        out.sum().backward()
        return out.detach(), x.grad

    if impl == "cpp":
        assert_same_bits_with_any_number_of_threads(run)
    whole = run()
    for b in (0, B // 2, B - 1):
        alone = run(slice(b, b + 1))
        assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, whole, strict=True))


@each_estimator
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_slope", [False, True])
def test_opcheck(estimator, masked, with_slope):
    logprobs, ref, mask, _ = (x.detach() for x in batch(dtype=torch.float32))
    arguments = (logprobs, ref, mask if masked else None, estimator, with_slope)
    torch.library.opcheck(torch.ops.ppo_fast.kl_estimate_cpp.default, arguments)
    slope = torch.ops.ppo_fast.kl_estimate_cpp.default(*arguments)[1]
    assert slope.shape == ((3, 5) if with_slope else (0,))


def test_raw_op_checks_the_arguments_of_the_kernel():
    x = torch.ones(2, 3)
    for name, arguments in {
        "ref_logprobs": (x, x[:, :2], None),
        "ref_logprobs: got torch.float64": (x, x.double(), None),
        "mask": (x, x, x),
    }.items():
        with pytest.raises(ValueError, match=name):
            torch.ops.ppo_fast.kl_estimate_cpp.default(*arguments, "k1", True)


@each_impl
def test_fake_tensors_and_autocast(impl):
    logprobs, ref, mask, _ = batch(dtype=torch.float32)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        inside = kl_estimate(logprobs, ref, mask=mask, estimator="k3", impl=impl)
    assert torch.equal(inside, kl_estimate(logprobs, ref, mask=mask, estimator="k3", impl=impl))
    with FakeTensorMode():
        x = torch.zeros(3, 5, requires_grad=True)
        out = kl_estimate(x, torch.zeros(3, 5), mask=x > 0, impl=impl)
        out.sum().backward()
        assert out.shape == x.grad.shape == (3, 5)


def test_auto_is_cpp_on_the_cpu(monkeypatch):
    monkeypatch.setattr(api.reference, "kl_estimate", None)
    kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"estimator": "k4"}, ValueError, r"'k4'.*k1, abs, k2, k3, k1\+k2"),
        ({"mask": torch.ones(3, 5)}, TypeError, r"mask is torch.float32.*mask.bool\(\)"),
        ({"mask": torch.ones(3, 4, dtype=torch.bool)}, ValueError, r"logprobs \[3, 5\].*\[3, 4\]"),
        ({"ref_logprobs": torch.ones(5)}, ValueError, r"ref_logprobs \[5\]"),
        ({"ref_logprobs": torch.ones(3, 5, dtype=torch.long)}, TypeError, "int64"),
        ({"ref_logprobs": 1.0}, TypeError, "ref_logprobs is float"),
        ({"ref_logprobs": torch.ones(3, 5, device="meta")}, ValueError, "ref_logprobs on meta"),
        ({"impl": "numpy"}, ValueError, "numpy"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"ref_logprobs": torch.ones(3, 5), **change}
    with pytest.raises(error, match=words):
        kl_estimate(torch.ones(3, 5), **arguments)
