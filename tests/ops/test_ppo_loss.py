"""ppo_loss against the papers' formulas token by token in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_checks import compiled, padded_mask, tolerance
from ppo_loss_truth import (
    AGGREGATIONS,
    DTYPES,
    EVERYTHING,
    OBJECTIVES,
    RATIOS,
    TOLERANCE,
    batch,
    default_normalizer,
    each_aggregation,
    each_impl,
    run_all,
    truth,
)
from runnable import WIDE, examples

from ppo_fast.ops.ppo_loss import ppo_loss
from ppo_fast.ops.stats import PPO_STATS, merge_stats, ppo_metrics


@each_impl
@settings(deadline=None, max_examples=examples(300))
@given(
    data=st.fixed_dictionaries(
        {
            "seed": st.integers(0, 10**6),
            "B": st.integers(0, 4),
            "T": st.integers(0, 7),
            "valid": st.sampled_from([0.0, 0.3, 1.0]),
            "dtype": st.sampled_from(DTYPES),
            "scale": st.sampled_from([0.0, 0.1, 1.0]),
            "offset": st.sampled_from([-2.0, 1.5]),
            "weighted": st.booleans(),
        }
    ),
    options=st.fixed_dictionaries(
        {
            "clip": st.sampled_from([(0.2, 0.2), (0.1, 0.4), (0.0, 3.0)]),
            "dual_clip": st.sampled_from([None, 1.5, 3.0]),
            "kl_coef": st.sampled_from([0.0, 0.1, 2]),
            "kl_estimator": st.sampled_from(["abs", "k2", "k3", "k1+k2"]),
            "entropy_coef": st.sampled_from([0, 0.01, -0.5]),
            "aggregation": st.sampled_from(AGGREGATIONS),
            "ratio": st.sampled_from(RATIOS),
            "objective": st.sampled_from(OBJECTIVES),
        }
    ),
    normalizer=st.sampled_from([None, 7, 0.3, 11.0]),
    as_tensor=st.booleans(),
    upstream=st.sampled_from([-1.7, 0.3, 25.0]),
)
def test_loss_gradients_and_metrics(impl, data, options, normalizer, as_tensor, upstream):
    tensors = batch(**data)
    if options["objective"] != "clip":
        options["dual_clip"] = None
    if options["aggregation"] == "seq-mean-token-sum":
        normalizer = normalizer or 6
    expected = truth(tensors, **options, normalizer=normalizer)
    if as_tensor and normalizer is not None:
        normalizer = torch.tensor(normalizer, dtype=torch.float64)
    options |= {"normalizer": normalizer, "kl_clamp": False, "impl": impl}
    loss, metrics = ppo_loss(**tensors, **options)
    (loss * upstream).backward()

    dtype = data["dtype"]
    limit = TOLERANCE[dtype] * expected[4]  # sums cancel: errors are of the size of the terms
    close = {"rtol": TOLERANCE[dtype], "atol": limit * abs(upstream)}
    stored = {"rtol": 2**-8, "atol": limit} if dtype == torch.bfloat16 else close
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (metrics.dtype, metrics.requires_grad) == (torch.float32, False)
    assert loss.item() == pytest.approx(expected[0], rel=TOLERANCE[dtype], abs=limit)
    gradient = tensors["logprobs"].grad
    torch.testing.assert_close(gradient.double(), expected[1] * upstream, **stored)
    if options["entropy_coef"] != 0:
        gradient = tensors["entropy"].grad
        torch.testing.assert_close(gradient.double(), expected[2] * upstream, **stored)
    else:
        assert tensors["entropy"].grad is None
    assert metrics.tolist() == pytest.approx(expected[3], rel=3e-6, abs=3e-6 * expected[4])


@each_aggregation
@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_gradcheck_of_the_reference(aggregation, dual_clip):
    """One log-ratio in the middle of every region, for both signs of the advantage."""
    tensors = batch(B=2, T=4, valid=2.0)
    log_ratio = torch.tensor([-0.6, -0.1, 0.1, 0.9], dtype=torch.float64)
    tensors["old_logprobs"] = tensors["logprobs"].detach() - log_ratio
    tensors["advantages"] = torch.tensor([[1.5], [-0.7]], dtype=torch.float64).expand(2, 4)
    constants = {k: x for k, x in tensors.items() if not x.requires_grad}
    options = {**EVERYTHING, "dual_clip": dual_clip, "aggregation": aggregation, "normalizer": 5}
    torch.autograd.gradcheck(
        lambda lp, h: ppo_loss(lp, entropy=h, **constants, **options, impl="reference").loss,
        (tensors["logprobs"], tensors["entropy"]),
    )


@each_impl
@pytest.mark.parametrize("estimator", ["abs", "k2", "k3", "k1+k2"])
def test_the_two_coefficients_of_a_token(impl, estimator):
    """a = dL/dl = [active](-A r) + beta (slope of the estimator), b = dL/dH: all the head needs."""
    tensors = batch(B=4, T=9)
    options = {**EVERYTHING, "kl_estimator": estimator, "normalizer": 1}
    loss = ppo_loss(**tensors, **options, impl=impl).loss
    a, b = torch.autograd.grad(2.5 * loss, (tensors["logprobs"], tensors["entropy"]))

    mask, adv = tensors["mask"], tensors["advantages"]
    ratio = (tensors["logprobs"] - tensors["old_logprobs"]).detach().exp()
    inactive = ((adv > 0) & (ratio > 1.3)) | ((adv < 0) & ((ratio < 0.8) | (ratio > 2.0)))
    assert inactive[mask].any()
    assert not inactive[mask].all()
    d = (tensors["logprobs"] - tensors["ref_logprobs"]).detach()
    slope = {"abs": d.sign(), "k2": d, "k3": 1 - (-d).exp(), "k1+k2": d}[estimator]
    expected = torch.where(inactive, 0, -adv * ratio) + 0.3 * slope
    limits = {"rtol": tolerance(1e-12, 1e-6), "atol": tolerance(1e-14, 1e-6)}
    torch.testing.assert_close(a, 2.5 * expected * mask, **limits)
    torch.testing.assert_close(b, -0.25 * mask.to(WIDE), rtol=0, atol=tolerance(1e-15, 1e-7))

    without_kl = ppo_loss(**tensors, **{**options, "kl_coef": 0.0}, impl=impl).loss
    (a,) = torch.autograd.grad(without_kl, tensors["logprobs"])
    assert torch.equal(a == 0, inactive | ~mask)


@each_impl
def test_k1_plus_k2_has_the_value_of_k1_and_the_gradient_of_k2(impl):
    tensors = batch()
    plain = ppo_loss(**tensors, impl=impl)
    losses = {
        name: ppo_loss(**tensors, kl_coef=0.7, kl_estimator=name, impl=impl)
        for name in ("k1+k2", "k2")
    }
    gradients = {
        name: torch.autograd.grad(x.loss, tensors["logprobs"])[0] for name, x in losses.items()
    }
    assert torch.equal(gradients["k1+k2"], gradients["k2"])
    k1 = (tensors["logprobs"] - tensors["ref_logprobs"])[tensors["mask"]].mean()
    torch.testing.assert_close(losses["k1+k2"].loss, plain.loss + 0.7 * k1)
    metrics = ppo_metrics(losses["k1+k2"].metrics)
    assert metrics["kl_loss"] == metrics["ref_kl"] == pytest.approx(k1.item(), rel=1e-6)


@each_impl
@each_aggregation
@pytest.mark.parametrize("as_tensor", [False, True])
def test_splitting_a_step_changes_nothing(impl, aggregation, as_tensor):
    tensors = batch(B=6, T=7)
    tensors["mask"][3] = False
    leaves = (tensors["logprobs"], tensors["entropy"])
    counts = {"seq-mean-token-sum": 6 * 7}
    normalizer = counts.get(aggregation) or default_normalizer(tensors["mask"], aggregation)
    options = {**EVERYTHING, "aggregation": aggregation, "impl": impl}
    given = normalizer if aggregation == "seq-mean-token-sum" else None
    whole = ppo_loss(**tensors, **options, normalizer=given)
    expected = torch.autograd.grad(whole.loss, leaves)

    if as_tensor:
        normalizer = torch.tensor(normalizer)
    parts = [
        ppo_loss(**{k: x[rows] for k, x in tensors.items()}, **options, normalizer=normalizer)
        for rows in (slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 6))
    ]
    loss = sum(part.loss for part in parts)
    limits = {"rtol": tolerance(1e-13, 1e-6), "atol": tolerance(1e-15, 1e-7)}
    torch.testing.assert_close(loss, whole.loss, **limits)
    for x, y in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(x, y, **limits)
    merged = merge_stats(PPO_STATS, [part.metrics for part in parts])
    torch.testing.assert_close(merged, whole.metrics, rtol=1e-6, atol=1e-6)


@each_impl
@each_aggregation
def test_padding_and_order_do_not_matter(impl, aggregation):
    tensors = batch(B=4, T=6)
    options = {**EVERYTHING, "aggregation": aggregation, "normalizer": 5, "impl": impl}
    whole = ppo_loss(**tensors, **options)
    order = torch.tensor([2, 0, 3, 1])
    moved = {k: torch.nn.functional.pad(x[order], (0, 3)) for k, x in tensors.items()}
    other = ppo_loss(**moved, **options)
    limits = {"rtol": tolerance(1e-13, 1e-6), "atol": tolerance(1e-15, 1e-7)}
    torch.testing.assert_close(other.loss, whole.loss, **limits)
    torch.testing.assert_close(other.metrics, whole.metrics, rtol=1e-6, atol=1e-6)


@each_impl
def test_the_first_minibatch_has_ratio_one(impl):
    tensors = batch(dtype=torch.float32)
    tensors["old_logprobs"] = tensors["logprobs"].detach()
    loss, stats = ppo_loss(**tensors, impl=impl)
    metrics = ppo_metrics(stats)
    assert metrics["ratio_min"] == metrics["ratio_mean"] == metrics["ratio_max"] == 1
    assert metrics["max_log_ratio"] == metrics["approx_kl"] == metrics["approx_kl_k3"] == 0
    assert metrics["clip_fraction"] == 0
    torch.testing.assert_close(loss, -tensors["advantages"][tensors["mask"]].mean())


@each_impl
def test_metrics_without_reference_and_entropy(impl):
    tensors = batch()
    only = {k: tensors[k] for k in ("logprobs", "old_logprobs", "advantages", "mask")}
    one, whole = (ppo_metrics(ppo_loss(**x, impl=impl).metrics) for x in (only, tensors))
    assert one["kl_loss"] == one["ref_kl"] == one["entropy"] == 0
    assert whole["ref_kl"] != 0
    assert whole["entropy"] > 0
    assert one == {**whole, "kl_loss": 0.0, "ref_kl": 0.0, "entropy": 0.0}


@each_impl
def test_k1_is_a_metric_where_there_is_no_coefficient(impl):
    metrics = ppo_metrics(ppo_loss(**batch(), kl_estimator="k1", impl=impl).metrics)
    assert metrics["kl_loss"] == metrics["ref_kl"] != 0


@pytest.mark.parametrize("impl", compiled("ppo_loss"))
@each_aggregation
def test_error_budget(impl, aggregation):
    """err(kernel) <= 2 err(eager in float32) + a few eps, both against float64."""
    tensors = {**batch(B=6, T=700, dtype=torch.float32), "mask": padded_mask(6, 700)}
    options = {**EVERYTHING, "aggregation": aggregation, "normalizer": 2000.0}
    wide = {k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}
    exact = run_all(wide, **options, impl="reference")
    eager, ours = (run_all(tensors, **options, impl=x) for x in ("reference", impl))
    for name, x, y, exactly in zip("lmab", ours, eager, exact, strict=True):
        size = exactly.abs().clamp(min=1.0) if name == "m" else exactly.abs().amax().clamp(min=1e-3)
        error, allowed = (x - exactly).abs(), 2 * (y - exactly).abs().amax() if name != "m" else 0
        if name == "m":
            allowed = 2 * (y - exactly).abs()
        assert (error <= allowed + 4 * torch.finfo(torch.float32).eps * size).all(), name


@each_impl
@pytest.mark.parametrize("sign", [-1, 1])
def test_masked_tokens_are_no_extrema(impl, sign):
    """Longer than a vector, and every ratio on the same side of 1."""
    tensors = batch(B=3, T=40)
    log_ratio = sign * (0.1 + torch.rand(3, 40, dtype=torch.float64))
    tensors["old_logprobs"] = tensors["logprobs"].detach() - log_ratio
    metrics = ppo_metrics(ppo_loss(**tensors, impl=impl).metrics)
    valid = log_ratio[tensors["mask"]]
    assert metrics["ratio_min"] == pytest.approx(valid.min().exp().item(), rel=1e-6)
    assert metrics["ratio_max"] == pytest.approx(valid.max().exp().item(), rel=1e-6)
    assert metrics["max_log_ratio"] == pytest.approx(valid.abs().max().item(), rel=1e-6)
