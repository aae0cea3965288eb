"""value_loss against its formula token by token in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_checks import (
    compiled,
    padded_mask,
    programs_take_several_blocks,
    tolerance,
)
from runnable import FLOATS, examples
from value_loss_truth import TOLERANCE, batch, each_clip, each_huber, each_impl, run_all, truth

from ppo_fast.ops.stats import VALUE_STATS, merge_stats, value_metrics
from ppo_fast.ops.value_loss import value_loss


@each_impl
@settings(deadline=None, max_examples=examples(100))
@given(
    seed=st.integers(0, 10**6),
    B=st.integers(0, 3),
    T=st.integers(0, 7),
    valid=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from([dtype for dtype in TOLERANCE if dtype in FLOATS]),
    clip=st.sampled_from([None, 0.2, 1.0]),
    huber=st.sampled_from([None, 0.1, 1.0, 100]),
    normalizer=st.sampled_from([None, 7, 0.3, 11.0]),
    as_tensor=st.booleans(),
)
def test_loss_gradient_and_metrics(
    impl, seed, B, T, valid, dtype, clip, huber, normalizer, as_tensor
):
    tensors, upstream = batch(seed, B, T, dtype, valid)
    expected = truth(**tensors, clip=clip, normalizer=normalizer, huber=huber)
    if as_tensor and normalizer is not None:
        normalizer = torch.tensor(normalizer, dtype=torch.float64)
    values = tensors.pop("values")
    options = {"clip": clip, "huber": huber, "normalizer": normalizer}
    loss, metrics = value_loss(values, **tensors, **options, impl=impl)
    (loss * upstream).backward()

    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    stored = {"rtol": 2**-8, "atol": 1e-6} if dtype == torch.bfloat16 else close
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (metrics.dtype, metrics.requires_grad) == (torch.float32, False)
    assert loss.item() == pytest.approx(expected[0], rel=close["rtol"], abs=close["atol"])
    torch.testing.assert_close(values.grad.double(), expected[1] * upstream, **stored)
    assert metrics.tolist() == pytest.approx(expected[2], rel=1e-5, abs=1e-5)


@each_clip
@each_huber
def test_gradcheck_of_the_reference(clip, huber):
    tensors, _ = batch(seed=1)
    values = tensors.pop("values")
    assert value_loss(values, **tensors, clip=0.4).metrics[2] > 0
    torch.autograd.gradcheck(
        lambda v: value_loss(v, **tensors, clip=clip, huber=huber, impl="reference").loss, values
    )


@each_impl
@each_clip
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e38])
def test_masked_values_do_not_reach_loss_or_gradients(impl, clip, poison):
    clean, _ = batch(dtype=torch.float32)
    mask = clean["mask"]
    dirty = {k: x.detach().masked_fill(~mask, poison) for k, x in clean.items() if k != "mask"}
    dirty["values"].requires_grad_()
    one = value_loss(**clean, clip=clip, impl=impl)
    other = value_loss(**dirty, mask=mask, clip=clip, impl=impl)
    one.loss.backward()
    other.loss.backward()
    assert torch.equal(one.loss, other.loss)
    assert torch.equal(one.metrics, other.metrics)
    assert torch.equal(clean["values"].grad, dirty["values"].grad)
    assert (dirty["values"].grad[~mask] == 0).all()


@each_impl
@each_clip
@pytest.mark.parametrize("as_tensor", [False, True])
def test_splitting_a_step_changes_nothing(impl, clip, as_tensor):
    tensors, _ = batch(B=5, T=6)
    tensors["mask"][3] = False
    tokens = tensors["mask"].sum()
    whole = value_loss(**tensors, clip=clip, impl=impl)
    (expected,) = torch.autograd.grad(whole.loss, tensors["values"])

    normalizer = tokens if as_tensor else tokens.item()
    parts = [
        value_loss(
            **{k: x[rows] for k, x in tensors.items()}, clip=clip, normalizer=normalizer, impl=impl
        )
        for rows in (slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5))
    ]
    loss = sum(part.loss for part in parts)
    (gradient,) = torch.autograd.grad(loss, tensors["values"])
    limit = tolerance(1e-13, 1e-6)
    torch.testing.assert_close(loss, whole.loss, rtol=limit, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=limit, atol=0)
    merged = merge_stats(VALUE_STATS, [part.metrics for part in parts])
    torch.testing.assert_close(merged, whole.metrics, rtol=1e-6, atol=1e-6)


@each_impl
@pytest.mark.parametrize("normalizer", [None, 9.0, torch.tensor(0)])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (3, 0)])
def test_without_valid_tokens_loss_and_gradient_are_zero(impl, normalizer, shape):
    values = torch.randn(shape, requires_grad=True)
    loss, metrics = value_loss(
        values,
        old_values=torch.full(shape, math.nan),
        returns=torch.full(shape, math.inf),
        mask=torch.zeros(shape, dtype=torch.bool),
        clip=0.2,
        normalizer=normalizer,
        impl=impl,
    )
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(values.grad, torch.zeros(shape))
    assert metrics.tolist() == [0.0] * 8 + [math.inf, -math.inf]


@each_impl
def test_rounding_never_counts_as_clipping(impl):
    """In the clip range, old + clamp(v - old) differs from v by rounding: v itself must be used."""
    values = (1e-3 * torch.rand(40, 50)).requires_grad_()
    returns = 1e-3 * torch.rand(40, 50)
    loss, metrics = value_loss(
        values,
        old_values=0.5 + torch.rand(40, 50),
        returns=returns,
        mask=torch.ones(40, 50, dtype=torch.bool),
        clip=2.0,
        impl=impl,
    )
    loss.backward()
    assert metrics[list(VALUE_STATS).index("clipped")] == 0
    error = values.detach() - returns
    torch.testing.assert_close(values.grad, error / error.numel(), rtol=1e-6, atol=0)


@each_impl
def test_equal_errors_keep_the_gradient(impl):
    """v - R = 1 and v_c - R = -1 are exact in binary: the unclipped error gives the gradient."""
    values = torch.tensor([[2.0]], requires_grad=True)
    loss, metrics = value_loss(
        values,
        old_values=torch.tensor([[-0.5]]),
        returns=torch.tensor([[1.0]]),
        mask=torch.tensor([[True]]),
        clip=0.5,
        impl=impl,
    )
    loss.backward()
    assert (loss.item(), values.grad.item()) == (0.5, 1.0)
    assert metrics[list(VALUE_STATS).index("clipped")] == 0


@pytest.mark.parametrize("impl", compiled("value_loss"))
@each_clip
@each_huber
def test_more_tokens_than_the_kernel_takes_at_once(impl, clip, huber, monkeypatch):
    programs_take_several_blocks(impl, monkeypatch)
    tensors = {**batch(B=6, T=1100)[0], "mask": padded_mask(6, 1100)}
    ours = run_all(tensors, clip=clip, huber=huber, impl=impl)
    wide = {k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}
    reference = run_all(wide, clip=clip, huber=huber, impl="reference")
    for i, (x, y) in enumerate(zip(ours, reference, strict=True)):
        limit = 1e-6 if i == 1 else tolerance(1e-12, 1e-6)
        torch.testing.assert_close(x.to(y.dtype), y, rtol=limit, atol=limit)


@pytest.mark.parametrize("impl", compiled("value_loss"))
@each_clip
@each_huber
def test_error_budget(impl, clip, huber):
    """err(kernel) <= 2 err(eager in float32) + a few eps, both against float64."""
    tensors = {**batch(B=6, T=700, dtype=torch.float32)[0], "mask": padded_mask(6, 700)}
    wide = {k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}
    options = {"clip": clip, "huber": huber}
    exact = run_all(wide, **options, impl="reference")
    eager, ours = (run_all(tensors, **options, impl=x) for x in ("reference", impl))
    for x, y, exactly in zip(ours, eager, exact, strict=True):
        allowed = (
            2 * (y - exactly).abs().amax() + 4 * torch.finfo(torch.float32).eps * exactly.abs()
        )
        assert ((x - exactly).abs() <= allowed).all()


@each_impl
@each_clip
def test_a_large_huber_has_the_bits_of_the_squared_error(impl, clip):
    tensors = {**batch(B=6, T=301)[0], "mask": padded_mask(6, 301)}
    squared, huber = (run_all(tensors, clip=clip, huber=x, impl=impl) for x in (None, 1e30))
    assert all(map(torch.equal, squared, huber))


@each_impl
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_huber_around_its_bound_and_far_beyond(impl, sign):
    """The error 1e30 has no square in float32; on the bound both formulas agree."""
    values = sign * torch.tensor([[0.25, 0.5, 0.75, 1e30]])
    values.requires_grad_()
    zero = torch.zeros(1, 4)
    loss = value_loss(
        values, old_values=None, returns=zero, mask=zero == 0, huber=0.5, normalizer=1, impl=impl
    ).loss
    loss.backward()
    assert values.grad.tolist() == [[0.25 * sign, 0.5 * sign, 0.5 * sign, 0.5 * sign]]
    assert loss.item() == pytest.approx(0.5e30)
    near = value_loss(
        values, old_values=None, returns=zero, mask=values.abs() < 1, huber=0.5, impl=impl
    )
    assert near.loss.item() == pytest.approx((0.03125 + 0.125 + 0.25) / 3)


@each_impl
def test_a_nan_at_a_valid_token_gives_a_nan_loss(impl):
    tensors, _ = batch(B=3, T=40)
    with torch.no_grad():
        tensors["values"][1, 17] = math.nan
    tensors["mask"][1, 17] = True
    loss, metrics = value_loss(**tensors, clip=0.4, impl=impl)
    assert loss.isnan()
    metrics = dict(zip(VALUE_STATS, metrics.tolist(), strict=True))
    assert {name for name, x in metrics.items() if not math.isnan(x)} == {
        "tokens",
        "clipped",
        "returns",
        "returns_squared",
    }


@each_impl
@pytest.mark.parametrize("zero", [torch.tensor(0), torch.tensor(0.0)])
def test_a_normalizer_of_zero_counts_as_one(impl, zero):
    one, other = (value_loss(**batch()[0], normalizer=x, impl=impl).loss for x in (1, zero))
    assert torch.equal(one, other)


@each_impl
@pytest.mark.parametrize("offset", [-9.0, 9.0])
def test_masked_tokens_do_not_count_in_min_and_max(impl, offset):
    """Rows are longer than a SIMD vector, and all values have the same sign."""
    tensors, _ = batch(B=3, T=40)
    tensors["values"] = tensors["values"].detach() + offset
    metrics = value_metrics(value_loss(**tensors, impl=impl).metrics)
    valid = tensors["values"][tensors["mask"]]
    assert metrics["value_min"] == pytest.approx(valid.min().item(), rel=1e-6)
    assert metrics["value_max"] == pytest.approx(valid.max().item(), rel=1e-6)


@each_impl
def test_old_values_without_a_clip_are_ignored(impl):
    tensors, _ = batch()
    with_old = value_loss(**tensors, impl=impl)
    without = value_loss(**{**tensors, "old_values": None}, impl=impl)
    assert torch.equal(with_old.loss, without.loss)
    assert torch.equal(with_old.metrics, without.metrics)
