"""ppo_loss at the edges: NaN and infinity, extreme ratios, bounds, no tokens, a normalizer of 0."""

from __future__ import annotations

import math

import pytest
import torch
from ppo_loss_truth import EVERYTHING, batch, each_aggregation, each_impl

from ppo_fast.ops.ppo_loss import ppo_loss
from ppo_fast.ops.stats import PPO_STATS, ppo_metrics


@each_impl
@each_aggregation
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e38])
def test_what_stands_under_the_mask_never_travels(impl, aggregation, poison):
    clean = batch(dtype=torch.float32)
    mask = clean["mask"]
    clean["mask"][1] = False
    options = {**EVERYTHING, "aggregation": aggregation, "normalizer": 4, "impl": impl}
    one = ppo_loss(**clean, **options)
    wanted = torch.autograd.grad(one.loss, (clean["logprobs"], clean["entropy"]))
    names = ("logprobs", "old_logprobs", "ref_logprobs", "advantages", "entropy", "all")
    for name in names if impl != "triton" or math.isnan(poison) else names[-1:]:
        dirty = {
            k: x.detach().masked_fill(~mask, poison) if k != "mask" and name in (k, "all") else x
            for k, x in clean.items()
        }
        dirty["logprobs"].requires_grad_()
        dirty["entropy"].requires_grad_()
        other = ppo_loss(**dirty, **options)
        got = torch.autograd.grad(other.loss, (dirty["logprobs"], dirty["entropy"]))
        assert torch.equal(one.loss, other.loss)
        assert torch.equal(one.metrics, other.metrics)
        for x, y in zip(wanted, got, strict=True):
            assert torch.equal(x, y)
            assert (y[~mask] == 0).all()


@each_impl
@each_aggregation
@pytest.mark.parametrize("normalizer", [9.0, torch.tensor(0), None])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (3, 0)])
def test_no_token_no_loss(impl, aggregation, normalizer, shape):
    if aggregation == "seq-mean-token-sum" and normalizer is None:
        normalizer = 3
    tensors = {name: torch.full(shape, math.nan) for name in batch() if name != "mask"}
    logprobs, entropy = tensors["logprobs"].requires_grad_(), tensors["entropy"].requires_grad_()
    mask = torch.zeros(shape, dtype=torch.bool)
    options = {**EVERYTHING, "aggregation": aggregation, "normalizer": normalizer}
    loss, metrics = ppo_loss(**tensors, mask=mask, **options, impl=impl)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logprobs.grad, torch.zeros(shape))
    assert torch.equal(entropy.grad, torch.zeros(shape))
    assert metrics.tolist() == [0.0] * 11 + [math.inf, -math.inf, -math.inf]
    assert set(ppo_metrics(metrics).values()) == {0.0}


@each_impl
@pytest.mark.parametrize(
    ("log_ratio", "adv", "dual_clip", "loss", "gradient"),
    [
        (1000.0, 2.0, None, -2.4, 0.0),
        (math.inf, 2.0, None, -2.4, 0.0),
        (1000.0, 0.0, None, 0.0, 0.0),
        (1000.0, -2.0, 3.0, 6.0, 0.0),
        (math.inf, -2.0, 3.0, 6.0, 0.0),
        (1000.0, -2.0, None, math.inf, math.inf),
        (-1000.0, 2.0, None, 0.0, 0.0),
        (-math.inf, 2.0, None, 0.0, 0.0),
        (-1000.0, -2.0, 3.0, 1.6, 0.0),
        (-math.inf, -2.0, None, 1.6, 0.0),
        (80.0, -2.0, None, 2 * math.exp(80), 2 * math.exp(80)),
    ],
)
def test_extreme_ratios(impl, log_ratio, adv, dual_clip, loss, gradient):
    logprobs = torch.tensor([[log_ratio]], requires_grad=True)
    one = torch.ones(1, 1)
    out = ppo_loss(
        logprobs,
        old_logprobs=0 * one,
        advantages=adv * one,
        mask=one.bool(),
        dual_clip=dual_clip,
        impl=impl,
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss, rel=1e-5)
    assert logprobs.grad.item() == pytest.approx(gradient, rel=1e-5)


@each_impl
@pytest.mark.parametrize(
    ("given", "nan", "none"),
    [
        ("logprobs", ["policy_loss", "ref_kl", "ratio_min", "max_log_ratio"], ["entropy"]),
        ("ref_logprobs", ["kl_loss", "ref_kl"], ["policy_loss", "ratio_max", "entropy"]),
        ("entropy", ["entropy"], ["policy_loss", "kl_loss", "ratio_min"]),
        ("advantages", ["policy_loss"], ["kl_loss", "ratio_min", "clipped_low"]),
    ],
)
def test_a_nan_at_a_valid_token_shows(impl, given, nan, none):
    tensors = batch(B=3, T=40, valid=2.0)
    with torch.no_grad():
        tensors[given][1, 17] = math.nan
    loss, metrics = ppo_loss(**tensors, **EVERYTHING, impl=impl)
    assert loss.isnan()
    metrics = dict(zip(PPO_STATS, metrics.tolist(), strict=True))
    assert all(math.isnan(metrics[name]) for name in nan)
    assert not any(math.isnan(metrics[name]) for name in none)


@each_impl
@each_aggregation
@pytest.mark.parametrize("zero", [torch.tensor(0), torch.tensor(0.0)])
def test_a_normalizer_of_zero_counts_as_one(impl, aggregation, zero):
    options = {**EVERYTHING, "aggregation": aggregation, "impl": impl}
    one, other = (ppo_loss(**batch(), **options, normalizer=x).loss for x in (1, zero))
    assert torch.equal(one, other)


@each_impl
def test_a_token_without_advantage_is_not_counted_as_clipped(impl):
    logprobs, zero = torch.tensor([[2.0, -2.0]]), torch.zeros(1, 2)
    options = {"old_logprobs": zero, "advantages": zero, "mask": zero == 0, "dual_clip": 3.0}
    metrics = ppo_metrics(ppo_loss(logprobs, **options, impl=impl).metrics)
    assert metrics["clip_fraction"] == metrics["dual_clip_fraction"] == 0


@each_impl
def test_the_gradient_of_a_nan_ratio_is_that_of_torch_clamp(impl):
    tensors = batch(B=1, T=2, valid=2.0)
    tensors["old_logprobs"][:] = math.nan
    ppo_loss(**tensors, impl=impl).loss.backward()
    assert (tensors["logprobs"].grad == 0).all()


@each_impl
def test_approx_kl_k3_near_zero_is_not_lost_to_rounding(impl):
    logprobs, zero = torch.full((2, 3), 1e-3), torch.zeros(2, 3)
    options = {"old_logprobs": zero, "advantages": zero, "mask": zero == 0}
    metrics = ppo_metrics(ppo_loss(logprobs, **options, impl=impl).metrics)
    assert metrics["approx_kl_k3"] == pytest.approx(5.0017e-7, rel=2e-3)


@each_impl
def test_what_is_only_a_metric_stays_out_of_the_loss(impl):
    tensors = batch(valid=2.0)
    plain = ppo_loss(**tensors, impl=impl).loss
    with torch.no_grad():
        tensors["entropy"][0, 0] = math.inf
        tensors["ref_logprobs"][0, 0] = 800.0
    loss, metrics = ppo_loss(**tensors, kl_estimator="k3", kl_clamp=False, impl=impl)
    loss.backward()
    assert torch.equal(loss, plain)
    assert tensors["logprobs"].grad.isfinite().all()
    metrics = dict(zip(PPO_STATS, metrics.tolist(), strict=True))
    assert metrics["entropy"] == metrics["kl_loss"] == math.inf


@each_impl
@pytest.mark.parametrize("side", [-1.0, 1.0])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_a_token_on_a_bound_is_not_clipped(impl, side, dual_clip):
    """log r is the bound as float32 holds it, and the numbers next to it on either side."""
    clip = (0.25, 0.5)
    bounds = [math.log(1.5)] if side > 0 else [math.log(0.75), math.log(3.0)]
    for bound in bounds if side > 0 or dual_clip else bounds[:1]:
        inwards = -1.0 if bound == bounds[-1] and bound > 0 else 1.0
        on = torch.tensor(bound)
        near = [torch.nextafter(on, on + inwards * k) for k in (1.0, -1.0)]
        logprobs = torch.stack([near[0], on, near[1]])[None].requires_grad_()
        zero = torch.zeros(1, 3)
        out = ppo_loss(
            logprobs,
            old_logprobs=zero,
            advantages=zero + side,
            mask=zero == 0,
            clip=clip,
            dual_clip=dual_clip,
            impl=impl,
        )
        out.loss.backward()
        assert (logprobs.grad != 0).tolist() == [[True, True, False]]
        counts = dict(zip(PPO_STATS, out.metrics.tolist(), strict=True))
        assert counts["clipped_high"] + counts["clipped_low"] + counts["dual_clipped"] == 1


@each_impl
def test_k3_is_clamped_unless_told_otherwise(impl):
    tensors = batch(valid=2.0)
    with torch.no_grad():
        tensors["ref_logprobs"] += 100
    options = {"kl_coef": 0.5, "kl_estimator": "k3"}
    plain = ppo_loss(**{**tensors, "ref_logprobs": None}, impl=impl).loss
    loss, metrics = ppo_loss(**tensors, **options, impl=impl)
    torch.testing.assert_close(loss, plain + 5)
    gradients = [torch.autograd.grad(x, tensors["logprobs"])[0] for x in (loss, plain)]
    assert torch.equal(*gradients)
    metrics = dict(zip(PPO_STATS, metrics.tolist(), strict=True))
    assert metrics["kl_loss"] == 10 * metrics["tokens"]
    unclamped = ppo_loss(**tensors, **options, kl_clamp=False, impl=impl).loss
    assert unclamped > 1e38
