"""value_loss as an op: dtypes, layouts, autograd, compilers, threads, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from loss_checks import (
    assert_same_bits_with_any_number_of_threads,
    padded_mask,
    tolerance,
)
from runnable import FLOATS
from torch._subclasses.fake_tensor import FakeTensorMode
from value_loss_truth import batch, each_clip, each_impl, run_all

from ppo_fast.ops.stats import VALUE_STATS
from ppo_fast.ops.value_loss import api, value_loss


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


@pytest.mark.slow
@each_impl
@pytest.mark.parametrize(("clip", "huber"), [(None, None), (0.4, None), (0.4, 0.7)])
def test_on_meta_tensors_and_compiled(impl, clip, huber):
    def run(values, old_values, returns, mask):
        return value_loss(
            values,
            old_values=old_values,
            returns=returns,
            mask=mask,
            clip=clip,
            huber=huber,
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
    options = {"clip": 0.2, "huber": None, "normalizer": None, "num_gradients": 1}
    return arguments | options | changes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "changes",
    [{}, {"clip": None, "old_values": None}, {"huber": 0.7, "normalizer": torch.tensor(7)}],
)
@pytest.mark.parametrize("num_gradients", [0, 1])
def test_opcheck(changes, dtype, num_gradients):
    arguments = op_arguments(batch(dtype=dtype)[0], **changes, num_gradients=num_gradients)
    torch.library.opcheck(torch.ops.ppo_fast.value_loss_cpp.default, (), arguments)
    gradients = torch.ops.ppo_fast.value_loss_cpp.default(**arguments)[2]
    assert gradients.shape == (num_gradients, 3, 5)


def test_raw_op_checks_the_arguments_of_the_kernel():
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
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
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
        ({"huber": 0.0}, ValueError, "huber is 0.0, expected a finite number above 0"),
        ({"huber": math.inf}, ValueError, "huber is inf"),
        ({"huber": "1"}, TypeError, "huber is str"),
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
