"""ppo_loss as an op: dtypes, layouts, autograd, compilers, threads, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from loss_checks import (
    assert_same_bits_with_any_number_of_threads,
    compiled,
    padded_mask,
    programs_take_several_blocks,
    tolerance,
)
from ppo_loss_truth import (
    AGGREGATIONS,
    EVERYTHING,
    batch,
    each_aggregation,
    each_impl,
    run_all,
)
from runnable import FLOATS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_fast.ops.ppo_loss import api, ppo_loss
from ppo_fast.ops.stats import PPO_STATS, merge_stats


@each_impl
@each_aggregation
def test_strided_inputs(impl, aggregation):
    tensors = batch(B=4, T=6)
    options = {**EVERYTHING, "aggregation": aggregation, "normalizer": 5, "impl": impl}
    strided = {k: x.detach().T[::2] for k, x in tensors.items()}
    results = []
    for arguments in (strided, {k: x.contiguous() for k, x in strided.items()}):
        logprobs = arguments.pop("logprobs").requires_grad_()
        out = ppo_loss(logprobs, **arguments, **options)
        results.append((out.loss, out.metrics, torch.autograd.grad(out.loss, logprobs)[0]))
    torch.testing.assert_close(*results)


@each_impl
def test_only_logprobs_and_entropy_get_gradients(impl):
    tensors = batch()
    for name in ("old_logprobs", "advantages", "ref_logprobs"):
        tensors[name].requires_grad_()
    ppo_loss(**tensors, **EVERYTHING, impl=impl).loss.backward()
    with_gradient = {k for k, x in tensors.items() if x.grad is not None}
    assert with_gradient == {"logprobs", "entropy"}
    tensors["logprobs"] = tensors["logprobs"].detach()
    tensors["entropy"].grad = None
    ppo_loss(**tensors, **EVERYTHING, impl=impl).loss.backward()
    assert tensors["entropy"].grad.abs().sum() > 0


@each_impl
def test_autocast_does_not_lower_the_precision(impl):
    tensors = batch(dtype=torch.float32)
    plain = ppo_loss(**tensors, **EVERYTHING, impl=impl)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        cast = ppo_loss(**tensors, **EVERYTHING, impl=impl)
    assert torch.equal(plain.loss, cast.loss)
    assert torch.equal(plain.metrics, cast.metrics)


@each_aggregation
def test_on_meta_tensors(aggregation):
    """An operation that would wait for the device raises an error on meta tensors."""
    tensors = {k: x.detach().to("meta") for k, x in batch().items()}
    tensors["logprobs"].requires_grad_()
    normalizer = tensors["mask"].sum()
    out = ppo_loss(**tensors, **EVERYTHING, aggregation=aggregation, normalizer=normalizer)
    out.loss.backward()
    assert tensors["logprobs"].grad.shape == (3, 5)
    assert merge_stats(PPO_STATS, [out.metrics] * 2).shape == (len(PPO_STATS),)


@pytest.mark.slow
@each_impl
@pytest.mark.parametrize("options", [{}, {"ratio": "sequence", "objective": "mask"}])
def test_compiled_with_coefficients_that_change(impl, options):
    """The compiled loss has the same bits; other coefficients or normalizers do not recompile."""
    options = EVERYTHING | options
    options["dual_clip"] = None if options.get("objective") else 2.0

    def run(tensors, kl_coef, normalizer):
        changed = options | {"kl_coef": kl_coef, "normalizer": normalizer}
        return ppo_loss(**tensors, **changed, impl=impl)

    torch.compiler.reset()
    one_graph = torch.compile(run, fullgraph=True, backend="aot_eager")
    tensors = batch(dtype=torch.float32, weighted="ratio" in options)
    for step in range(4):
        with torch.compiler.set_stance("fail_on_recompile" if step > 1 else "default"):
            one, other = (f(tensors, 0.1 + 0.1 * step, 7.0 + step) for f in (run, one_graph))
        assert torch.equal(one.loss, other.loss)
        assert torch.equal(one.metrics, other.metrics)
        leaves = (tensors["logprobs"], tensors["entropy"])
        gradients = [torch.autograd.grad(x.loss, leaves) for x in (one, other)]
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", compiled("ppo_loss"))
@each_aggregation
@pytest.mark.parametrize("estimator", ["abs", "k2", "k3", "k1+k2"])
def test_more_tokens_than_the_kernel_takes_at_once(impl, aggregation, estimator, monkeypatch):
    programs_take_several_blocks(impl, monkeypatch)
    tensors = {**batch(B=6, T=1100), "mask": padded_mask(6, 1100)}
    # The extrema stand in the first block.
    tensors["old_logprobs"][0, 0] = tensors["logprobs"][0, 0].detach() + 3
    tensors["old_logprobs"][0, 1] = tensors["logprobs"][0, 1].detach() - 3
    options = {**EVERYTHING, "aggregation": aggregation, "kl_estimator": estimator}
    options["normalizer"] = 7 if aggregation == "seq-mean-token-sum" else None
    ours = run_all(tensors, **options, impl=impl)
    wide = {k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}
    reference = run_all(wide, **options, impl="reference")
    for i, (x, y) in enumerate(zip(ours, reference, strict=True)):
        limit = 1e-6 if i == 1 else tolerance(1e-12, 1e-6)
        torch.testing.assert_close(x.to(y.dtype), y, rtol=limit, atol=limit)


@each_impl
def test_backward_twice(impl):
    tensors = batch()
    leaves = (tensors["logprobs"], tensors["entropy"])
    loss = ppo_loss(**tensors, **EVERYTHING, impl=impl).loss
    one = torch.autograd.grad(loss, leaves, retain_graph=True)
    other = torch.autograd.grad(-2 * loss, leaves)
    assert all(torch.equal(-2 * x, y) for x, y in zip(one, other, strict=True))


@each_impl
def test_no_graph_without_a_gradient(impl):
    tensors = batch()
    with torch.no_grad():
        assert not ppo_loss(**tensors, **EVERYTHING, impl=impl).loss.requires_grad
    names = ("old_logprobs", "advantages", "ref_logprobs")
    constants = {k: x.detach().requires_grad_(k in names) for k, x in tensors.items()}
    assert not ppo_loss(**constants, **EVERYTHING, impl=impl).loss.requires_grad
    constants["entropy"].requires_grad_()
    no_bonus = {**EVERYTHING, "entropy_coef": 0.0}
    assert not ppo_loss(**constants, **no_bonus, impl=impl).loss.requires_grad
    # Nothing of it has changed.
    plain, whole = (ppo_loss(**x, **EVERYTHING, impl=impl) for x in (constants, tensors))
    assert torch.equal(plain.loss, whole.loss)
    assert torch.equal(plain.metrics, whole.metrics)


@each_impl
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_and_mixed_dtypes(impl, half):
    tensors = batch(dtype=half)
    low = ppo_loss(**{**tensors, "advantages": tensors["advantages"].double()}, impl=impl)
    assert low.loss.dtype == torch.float32
    wide = {k: x.detach().float() if k != "mask" else x for k, x in tensors.items()}
    assert torch.equal(low.loss, ppo_loss(**wide, impl=impl).loss)
    low.loss.backward()
    assert tensors["logprobs"].grad.dtype == half


@each_impl
@each_aggregation
@pytest.mark.parametrize("dtype", [x for x in FLOATS if x.itemsize >= 4])
def test_bits_do_not_depend_on_threads_or_other_rows(impl, aggregation, dtype):
    B, T = (5, 301) if impl == "triton" else (37, 700)
    tensors = {**batch(B=B, T=T, dtype=dtype), "mask": padded_mask(B, T)}
    options = {**EVERYTHING, "aggregation": aggregation, "normalizer": 99.0, "impl": impl}
    if impl == "cpp":
        assert_same_bits_with_any_number_of_threads(lambda: run_all(tensors, **options))
    _, _, *whole = run_all(tensors, **options)
    for b in (0, 1, 2, B // 2 + 1, B - 1):
        _, _, *alone = run_all({k: x[b : b + 1] for k, x in tensors.items()}, **options)
        assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, whole, strict=True))


OFF = torch.tensor(0.0, dtype=torch.float64)


def op_arguments(tensors, **changes):
    number = torch.tensor(0.3, dtype=torch.float64)
    names = ("logprobs", "entropy", "old_logprobs", "advantages", "ref_logprobs", "mask")
    arguments = {name: tensors[name].detach() for name in names} | {
        "weights": None,
        "ratio": "token",
        "objective": "clip",
        "clip_low": 0.2,
        "clip_high": 0.3,
        "dual_clip": 2.0,
        "kl_coef": number,
        "kl_estimator": "k3",
        "entropy_coef": number,
        "aggregation": "token-mean",
        "normalizer": torch.tensor(7),
        "num_gradients": 2,
    }
    return arguments | changes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_gradients": 0, "aggregation": "seq-mean-token-mean", "normalizer": None},
        {"num_gradients": 1, "dual_clip": None, "entropy": None, "entropy_coef": OFF},
        {"ref_logprobs": None, "kl_coef": OFF, "kl_estimator": "k1"},
        {"weights": torch.ones(3, 5), "ratio": "sequence", "objective": "cispo"},
        {"ratio": "sequence-product", "objective": "mask", "aggregation": "token-sum"},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(changes, dtype):
    arguments = op_arguments(batch(dtype=dtype), **changes)
    if arguments["weights"] is not None:
        arguments["weights"] = arguments["weights"].to(dtype)
    torch.library.opcheck(torch.ops.ppo_fast.ppo_loss_cpp.default, (), arguments)
    gradients = torch.ops.ppo_fast.ppo_loss_cpp.default(**arguments)[2]
    assert gradients.shape == (arguments["num_gradients"], 3, 5)


def test_raw_op_checks_the_arguments_of_the_kernel():
    tensors = batch(dtype=torch.float32)
    for name in ("entropy", "old_logprobs", "advantages", "ref_logprobs", "weights"):
        for bad in (torch.ones(3, 4), torch.ones(3, 5).double()):
            with pytest.raises(ValueError, match=f"{name}: got"):
                torch.ops.ppo_fast.ppo_loss_cpp.default(**op_arguments(tensors, **{name: bad}))
    with pytest.raises(ValueError, match="mask: got"):
        torch.ops.ppo_fast.ppo_loss_cpp.default(**op_arguments(tensors, mask=torch.ones(3, 5)))
    for name in ("entropy", "ref_logprobs"):
        with pytest.raises(ValueError, match="an address that must not be 0 is 0"):
            torch.ops.ppo_fast.ppo_loss_cpp.default(**op_arguments(tensors, **{name: None}))


@each_impl
def test_on_fake_tensors(impl):
    with FakeTensorMode():
        x, h = torch.zeros(3, 5, requires_grad=True), torch.zeros(3, 5, requires_grad=True)
        tensors = dict.fromkeys(("old_logprobs", "advantages", "ref_logprobs"), torch.zeros(3, 5))
        out = ppo_loss(x, **tensors, entropy=h, mask=x > 0, **EVERYTHING, impl=impl)
        out.loss.backward()
    assert out.loss.shape == ()
    assert out.metrics.shape == (len(PPO_STATS),)
    assert x.grad.shape == h.grad.shape == (3, 5)


def test_auto_is_cpp_on_the_cpu(monkeypatch):
    monkeypatch.setattr(api.reference, "ppo_loss", None)
    ppo_loss(**batch(), **EVERYTHING)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"clip": 0.2}, TypeError, r"clip is 0.2, expected \(low, high\)"),
        ({"clip": (-0.1, 0.2)}, ValueError, "low end of clip is -0.1"),
        ({"clip": (1.0, 0.2)}, ValueError, "at least 0 and below 1"),
        ({"clip": (0.2, 0.0)}, ValueError, "high end of clip is 0.0"),
        ({"clip": (0.2, math.inf)}, ValueError, "high end of clip is inf"),
        ({"clip": ("a", 0.2)}, TypeError, "low end of clip is str"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip is 1.0, expected a finite number above 1"),
        ({"kl_coef": -0.1}, ValueError, "kl_coef is -0.1"),
        ({"kl_coef": math.nan}, ValueError, "kl_coef is nan"),
        ({"kl_coef": 0.1, "ref_logprobs": None}, ValueError, "ref_logprobs is None"),
        ({"kl_coef": 0.1, "kl_estimator": "k1"}, ValueError, "expected gradient of zero"),
        ({"kl_estimator": "k4"}, ValueError, r"'k4'.*k1, abs, k2, k3, k1\+k2"),
        ({"entropy_coef": 0.1, "entropy": None}, ValueError, "entropy is None"),
        ({"entropy_coef": math.inf}, ValueError, "entropy_coef is inf"),
        ({"ratio": "row"}, ValueError, "ratio is 'row'.* token, sequence, sequence-product"),
        ({"objective": "ppo"}, ValueError, "objective is 'ppo'.* clip, cispo, mask"),
        ({"objective": "mask", "dual_clip": 3.0}, ValueError, "'mask' has no dual clip; leave"),
        ({"objective": "cispo", "dual_clip": 3.0}, ValueError, "dual_clip is 3.0 but .*'cispo'"),
        ({"weights": torch.ones(3)}, ValueError, r"logprobs \[3, 5\].*weights \[3\]"),
        ({"weights": torch.ones(3, 5).int()}, TypeError, r"weights.float\(\)"),
        ({"weights": 2.0}, TypeError, "weights is float, expected a tensor"),
        ({"aggregation": "mean"}, ValueError, "'mean'.*" + ", ".join(AGGREGATIONS)),
        ({"aggregation": "seq-mean-token-sum"}, ValueError, "needs a normalizer"),
        ({"normalizer": 0}, ValueError, "normalizer is 0"),
        ({"normalizer": -3.0}, ValueError, "above 0"),
        ({"normalizer": "9"}, TypeError, "normalizer is str"),
        ({"normalizer": torch.ones(1)}, ValueError, r"shape \[1\], expected a 0-dim"),
        ({"advantages": torch.ones(3)}, ValueError, r"logprobs \[3, 5\].*advantages \[3\]"),
        ({"entropy": torch.ones(3, 4)}, ValueError, r"entropy \[3, 4\]"),
        ({"advantages": torch.ones(3, 5).int()}, TypeError, r"advantages.float\(\)"),
        ({"mask": torch.ones(3, 5)}, TypeError, r"mask.bool\(\)"),
        ({"old_logprobs": None}, TypeError, "old_logprobs is NoneType"),
        ({"mask": None}, TypeError, "mask is NoneType"),
        ({"ref_logprobs": torch.ones(3, 5, device="meta")}, ValueError, "ref_logprobs on meta"),
        ({"impl": "numpy"}, ValueError, "numpy"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        ppo_loss(**{**batch(), **change})


def test_the_loss_can_be_changed_in_place():
    loss = ppo_loss(**batch(dtype=torch.float32), impl="cpp").loss
    expected = 2 * loss.item()
    loss *= 2
    assert loss.item() == expected


def test_a_call_in_a_dispatch_mode_goes_through_the_dispatcher():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    tensors = batch(dtype=torch.float32)
    plain = ppo_loss(**tensors, **EVERYTHING, normalizer=7.0, impl="cpp")
    with Watch():
        watched = ppo_loss(**tensors, **EVERYTHING, normalizer=7.0, impl="cpp")
    assert "ppo_fast.ppo_loss_cpp.default" in seen
    assert torch.equal(plain.loss, watched.loss)
    assert torch.equal(plain.metrics, watched.metrics)
