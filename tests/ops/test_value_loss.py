"""value_loss against its formula token by token in float64."""

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
    programs_take_several_blocks,
    tolerance,
)
from runnable import FLOATS, WIDE, examples, generator, implementations
from torch._subclasses.fake_tensor import FakeTensorMode

from ppo_fast.ops.stats import VALUE_STATS, merge_stats, value_metrics
from ppo_fast.ops.value_loss import api, value_loss

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}

each_impl = pytest.mark.parametrize("impl", implementations("value_loss"))
each_clip = pytest.mark.parametrize("clip", [None, 0.4])


def batch(seed=0, B=3, T=5, dtype=WIDE, valid=0.7):
    g = generator(seed)
    x = torch.randn(3, B, T, generator=g, dtype=torch.float64).to(dtype)
    tensors = {
        "values": x[0].clone().requires_grad_(),
        "old_values": (x[0] + x[1]).clone(),
        "returns": x[2].clone(),
        "mask": torch.rand(B, T, generator=g) < valid,
    }
    return tensors, torch.randn((), generator=g).item()


def truth(values, old_values, returns, mask, clip, normalizer):
    """The formula as it is written, with its gradient: (loss, gradient, stats)."""
    gradient = torch.zeros(values.shape, dtype=torch.float64)
    stats = {"sum": 0.0, "min": math.inf, "max": -math.inf}
    stats = {name: stats[reduction] for name, reduction in VALUE_STATS.items()}
    normalizer = normalizer or max(int(mask.sum()), 1)
    for b, t in mask.nonzero().tolist():
        v, old, ret = (x[b, t].item() for x in (values, old_values, returns))
        error, slope = (v - ret) ** 2, 2 * (v - ret)
        if clip is not None:
            v_clipped = old + min(max(v - old, -clip), clip)
            if abs(v - old) > clip and (v_clipped - ret) ** 2 > error:
                error, slope = (v_clipped - ret) ** 2, 0.0
                stats["clipped"] += 1
        gradient[b, t] = 0.5 * slope / normalizer
        stats["tokens"] += 1
        stats["value_loss"] += 0.5 * error
        stats["values"] += v
        stats["returns"] += ret
        stats["returns_squared"] += ret**2
        stats["residual"] += ret - v
        stats["residual_squared"] += (ret - v) ** 2
        stats["value_min"] = min(stats["value_min"], v)
        stats["value_max"] = max(stats["value_max"], v)
    return stats["value_loss"] / normalizer, gradient, [stats[name] for name in VALUE_STATS]


@each_impl
@settings(deadline=None, max_examples=examples(100))
@given(
    seed=st.integers(0, 10**6),
    B=st.integers(0, 3),
    T=st.integers(0, 7),
    valid=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from([dtype for dtype in TOLERANCE if dtype in FLOATS]),
    clip=st.sampled_from([None, 0.2, 1.0]),
    normalizer=st.sampled_from([None, 7, 0.3, 11.0]),
    as_tensor=st.booleans(),
)
def test_loss_gradient_and_metrics(impl, seed, B, T, valid, dtype, clip, normalizer, as_tensor):
    tensors, upstream = batch(seed, B, T, dtype, valid)
    expected = truth(**tensors, clip=clip, normalizer=normalizer)
    if as_tensor and normalizer is not None:
        normalizer = torch.tensor(normalizer, dtype=torch.float64)
    values = tensors.pop("values")
    loss, metrics = value_loss(values, **tensors, clip=clip, normalizer=normalizer, impl=impl)
    (loss * upstream).backward()

    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    stored = {"rtol": 2**-8, "atol": 1e-6} if dtype == torch.bfloat16 else close
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (metrics.dtype, metrics.requires_grad) == (torch.float32, False)
    assert loss.item() == pytest.approx(expected[0], rel=close["rtol"], abs=close["atol"])
    torch.testing.assert_close(values.grad.double(), expected[1] * upstream, **stored)
    assert metrics.tolist() == pytest.approx(expected[2], rel=1e-5, abs=1e-5)


@each_clip
def test_gradcheck_of_the_reference(clip):
    tensors, _ = batch(seed=1)
    values = tensors.pop("values")
    assert value_loss(values, **tensors, clip=0.4).metrics[2] > 0
    torch.autograd.gradcheck(
        lambda v: value_loss(v, **tensors, clip=clip, impl="reference").loss, values
    )


@each_impl
@each_clip
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e38])
def test_what_stands_under_the_mask_never_travels(impl, clip, poison):
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
def test_no_token_no_loss(impl, normalizer, shape):
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
    """old + clamp(v - old) differs from v by rounding inside the range; v itself must be used."""
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
    """v - R = 1 and v_c - R = -1, exact in binary: the unclipped error decides."""
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


@each_impl
@each_clip
def test_strided_inputs(impl, clip):
    tensors, _ = batch(B=4, T=6)
    strided = {k: x.detach().T[::2] for k, x in tensors.items()}
    dense = {k: x.contiguous() for k, x in strided.items()}
    one, other = (value_loss(**x, clip=clip, impl=impl) for x in (strided, dense))
    torch.testing.assert_close(one.loss, other.loss, rtol=tolerance(1e-14, 1e-6), atol=0)
    torch.testing.assert_close(one.metrics, other.metrics)


@each_impl
def test_targets_are_constants(impl):
    tensors, _ = batch()
    for x in (tensors["old_values"], tensors["returns"]):
        x.requires_grad_()
    value_loss(**tensors, clip=0.4, impl=impl).loss.backward()
    assert tensors["old_values"].grad is None
    assert tensors["returns"].grad is None


@each_impl
@each_clip
def test_on_meta_tensors_and_compiled(impl, clip):
    def run(values, old_values, returns, mask):
        return value_loss(
            values,
            old_values=old_values,
            returns=returns,
            mask=mask,
            clip=clip,
            normalizer=mask.sum(),
            impl=impl if mask.device.type != "meta" else "reference",
        )

    tensors, _ = batch(dtype=torch.float32)
    meta = {k: x.detach().to("meta") for k, x in tensors.items()}
    meta["values"].requires_grad_()
    run(**meta).loss.backward()
    assert meta["values"].grad.shape == (3, 5)

    torch.compiler.reset()
    one_graph = torch.compile(run, fullgraph=True, backend="aot_eager")
    plain, traced = run(**tensors), one_graph(**tensors)
    assert torch.equal(traced.loss, plain.loss)
    assert torch.equal(traced.metrics, plain.metrics)
    gradients = [torch.autograd.grad(x.loss, tensors["values"])[0] for x in (plain, traced)]
    assert torch.equal(*gradients)


def run_all(tensors, **options):
    """Loss, metrics and gradient of one call."""
    values = tensors["values"].detach().requires_grad_()
    out = value_loss(**{**tensors, "values": values}, **options)
    return out.loss.detach(), out.metrics, torch.autograd.grad(-1.7 * out.loss, values)[0]


@pytest.mark.parametrize("impl", compiled("value_loss"))
@each_clip
def test_more_tokens_than_the_kernel_takes_at_once(impl, clip, monkeypatch):
    programs_take_several_blocks(impl, monkeypatch)
    tensors = {**batch(B=6, T=1100)[0], "mask": padded_mask(6, 1100)}
    ours = run_all(tensors, clip=clip, impl=impl)
    wide = {k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}
    reference = run_all(wide, clip=clip, impl="reference")
    for i, (x, y) in enumerate(zip(ours, reference, strict=True)):
        limit = 1e-6 if i == 1 else tolerance(1e-12, 1e-6)
        torch.testing.assert_close(x.to(y.dtype), y, rtol=limit, atol=limit)


@pytest.mark.parametrize("impl", compiled("value_loss"))
@each_clip
def test_error_budget(impl, clip):
    """err(kernel) <= 2 err(eager in float32) + a few eps, both against float64."""
    tensors = {**batch(B=6, T=700, dtype=torch.float32)[0], "mask": padded_mask(6, 700)}
    wide = {k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}
    exact = run_all(wide, clip=clip, impl="reference")
    eager, ours = (run_all(tensors, clip=clip, impl=x) for x in ("reference", impl))
    for x, y, truth in zip(ours, eager, exact, strict=True):
        allowed = 2 * (y - truth).abs().amax() + 4 * torch.finfo(torch.float32).eps * truth.abs()
        assert ((x - truth).abs() <= allowed).all()


@each_impl
@each_clip
def test_backward_twice(impl, clip):
    tensors, _ = batch()
    loss = value_loss(**tensors, clip=clip, impl=impl).loss
    (one,) = torch.autograd.grad(loss, tensors["values"], retain_graph=True)
    (other,) = torch.autograd.grad(-2 * loss, tensors["values"])
    assert torch.equal(-2 * one, other)


@each_impl
def test_no_graph_without_a_gradient(impl):
    tensors, _ = batch()
    whole = value_loss(**tensors, clip=0.4, impl=impl)
    with torch.no_grad():
        plain = value_loss(**tensors, clip=0.4, impl=impl)
    assert not plain.loss.requires_grad
    assert torch.equal(plain.loss, whole.loss)
    assert torch.equal(plain.metrics, whole.metrics)
    constants = {k: x.detach().requires_grad_(k != "mask") for k, x in tensors.items()}
    constants["values"] = constants["values"].detach()
    assert not value_loss(**constants, clip=0.4, impl=impl).loss.requires_grad


@each_impl
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_and_mixed_dtypes(impl, half):
    tensors, _ = batch(dtype=half)
    low = value_loss(**{**tensors, "returns": tensors["returns"].double()}, clip=0.4, impl=impl)
    assert low.loss.dtype == torch.float32
    wide = {k: x.detach().float() if k != "mask" else x for k, x in tensors.items()}
    assert torch.equal(low.loss, value_loss(**wide, clip=0.4, impl=impl).loss)
    low.loss.backward()
    assert tensors["values"].grad.dtype == half


@each_impl
def test_a_nan_at_a_valid_token_shows(impl):
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
def test_masked_tokens_are_no_extrema(impl, offset):
    """Longer than a vector, and every value on the same side of 0."""
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


@each_impl
@each_clip
@pytest.mark.parametrize("dtype", [x for x in FLOATS if x.itemsize >= 4])
def test_bits_do_not_depend_on_threads_or_other_rows(impl, clip, dtype):
    B, T = (5, 301) if impl == "triton" else (37, 1400)
    tensors = {**batch(B=B, T=T, dtype=dtype)[0], "mask": padded_mask(B, T)}
    options = {"clip": clip, "normalizer": 99.0, "impl": impl}
    if impl == "cpp":
        assert_same_bits_with_any_number_of_threads(lambda: run_all(tensors, **options))
    *_, whole = run_all(tensors, **options)
    for b in (0, 1, 2, B // 2 + 1, B - 1):
        *_, alone = run_all({k: x[b : b + 1] for k, x in tensors.items()}, **options)
        assert torch.equal(alone[0], whole[b])


def op_arguments(tensors, **changes):
    arguments = {name: x.detach() for name, x in tensors.items()}
    return {**arguments, "clip": 0.2, "normalizer": None, "num_gradients": 1, **changes}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "changes",
    [{}, {"clip": None, "old_values": None}, {"normalizer": torch.tensor(7)}],
)
@pytest.mark.parametrize("num_gradients", [0, 1])
def test_opcheck(changes, dtype, num_gradients):
    arguments = op_arguments(batch(dtype=dtype)[0], **changes, num_gradients=num_gradients)
    torch.library.opcheck(torch.ops.ppo_fast.value_loss_cpp.default, (), arguments)
    gradients = torch.ops.ppo_fast.value_loss_cpp.default(**arguments)[2]
    assert gradients.shape == (num_gradients, 3, 5)


def test_raw_op_checks_what_it_hands_to_the_kernel():
    tensors, _ = batch(dtype=torch.float32)
    for name in ("old_values", "returns"):
        for bad in (torch.ones(3, 4), torch.ones(3, 5).double()):
            with pytest.raises(ValueError, match=f"{name}: got"):
                torch.ops.ppo_fast.value_loss_cpp.default(**op_arguments(tensors, **{name: bad}))
    with pytest.raises(ValueError, match="mask: got"):
        torch.ops.ppo_fast.value_loss_cpp.default(**op_arguments(tensors, mask=torch.ones(3, 5)))


@each_impl
def test_fake_tensors_and_autocast(impl):
    tensors, _ = batch(dtype=torch.float32)
    plain = value_loss(**tensors, clip=0.4, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = value_loss(**tensors, clip=0.4, impl=impl)
    assert torch.equal(plain.loss, inside.loss)
    with FakeTensorMode():
        x, constant = torch.zeros(3, 5, requires_grad=True), torch.zeros(3, 5)
        options = {"old_values": constant, "returns": constant, "mask": x > 0, "clip": 0.4}
        out = value_loss(x, **options, impl=impl)
        out.loss.backward()
    assert out.metrics.shape == (len(VALUE_STATS),)
    assert x.grad.shape == (3, 5)


def test_auto_is_cpp_on_the_cpu(monkeypatch):
    monkeypatch.setattr(api.reference, "value_loss", None)
    value_loss(**batch()[0])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"clip": 0}, ValueError, "clip is 0, expected a finite number above 0"),
        ({"clip": math.nan}, ValueError, "clip is nan"),
        ({"clip": (0.2, 0.2)}, TypeError, "clip is tuple"),
        ({"clip": 0.2, "old_values": None}, ValueError, "give old_values"),
        ({"normalizer": 0}, ValueError, "normalizer is 0"),
        ({"normalizer": torch.ones(3)}, ValueError, r"normalizer has shape \[3\]"),
        ({"returns": torch.ones(3, 1)}, ValueError, r"values \[3, 5\].*returns \[3, 1\]"),
        ({"returns": torch.ones(3, 5).int()}, TypeError, r"returns.float\(\)"),
        ({"mask": torch.ones(3, 5)}, TypeError, r"mask.bool\(\)"),
        ({"impl": "numpy"}, ValueError, "numpy"),
    ],
)
def test_bad_input(change, error, words):
    tensors, _ = batch()
    with pytest.raises(error, match=words):
        value_loss(**{**tensors, **change})
