"""ppo_loss with importance weights, the ratios of sequences, and the objectives cispo and mask.

Their values and gradients token by token are in test_ppo_loss.py.
"""

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
from ppo_loss_truth import EVERYTHING, OBJECTIVES, RATIOS, batch, each_impl, run_all
from runnable import WIDE, generator

from ppo_fast.ops.ppo_loss import ppo_loss
from ppo_fast.ops.stats import PPO_STATS, merge_stats

each_ratio = pytest.mark.parametrize("ratio", RATIOS)
each_objective = pytest.mark.parametrize("objective", OBJECTIVES)
LEAVES = ("logprobs", "entropy")
AGGREGATION = {
    "token": "token-mean",
    "sequence": "seq-mean-token-mean",
    "sequence-product": "token-sum",
}


def options_of(ratio, objective, **more):
    dual_clip = EVERYTHING["dual_clip"] if objective == "clip" else None
    chosen = {"ratio": ratio, "objective": objective, "aggregation": AGGREGATION[ratio]}
    return EVERYTHING | {"dual_clip": dual_clip, "normalizer": 7.0} | chosen | more


def counts(metrics):
    return dict(zip(PPO_STATS, metrics.tolist(), strict=True))


def tokens(log_ratio, advantage, **more):
    """Return tensors of one row whose tokens have these log-ratios and this advantage."""
    logprobs = torch.tensor([log_ratio])
    zero = torch.zeros_like(logprobs)
    tensors = {"old_logprobs": zero, "advantages": zero + advantage, "mask": zero == 0}
    return {"logprobs": logprobs.requires_grad_(), **tensors, **more}


@pytest.mark.parametrize("impl", compiled("ppo_loss"))
@each_ratio
@each_objective
def test_error_budget(impl, ratio, objective):
    """err(kernel) <= 2 err(eager in float32) + a few eps, both against float64."""
    scale = 0.05 if ratio == "sequence-product" else 0.5
    tensors = batch(B=6, T=700, dtype=torch.float32, scale=scale, weighted=True)
    tensors["mask"] = padded_mask(6, 700)
    options = options_of(ratio, objective, normalizer=2000.0)
    wide = {k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}
    exact = run_all(wide, **options, impl="reference")
    eager, ours = (run_all(tensors, **options, impl=x) for x in ("reference", impl))
    eps = torch.finfo(torch.float32).eps
    for name, x, y, exactly in zip("lmab", ours, eager, exact, strict=True):
        error, allowed = (x - exactly).abs(), 2 * (y - exactly).abs()
        size = exactly.abs().clamp(min=1.0) if name == "m" else exactly.abs().amax().clamp(min=1e-3)
        allowed = allowed if name == "m" else allowed.amax()
        assert (error <= allowed + 4 * eps * size).all(), name


@pytest.mark.parametrize("impl", compiled("ppo_loss"))
@each_ratio
@each_objective
def test_more_tokens_than_the_kernel_takes_at_once(impl, ratio, objective, monkeypatch):
    programs_take_several_blocks(impl, monkeypatch)
    scale = 0.02 if ratio == "sequence-product" else 0.5
    tensors = {**batch(B=6, T=1100, scale=scale, weighted=True), "mask": padded_mask(6, 1100)}
    ours = run_all(tensors, **options_of(ratio, objective), impl=impl)
    wide = {k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}
    reference = run_all(wide, **options_of(ratio, objective), impl="reference")
    for i, (x, y) in enumerate(zip(ours, reference, strict=True)):
        limit = 1e-6 if i == 1 else tolerance(1e-12, 2e-6)
        torch.testing.assert_close(x.to(y.dtype), y, rtol=limit, atol=limit)


@each_impl
def test_defaults_and_weights_of_one_change_no_bit(impl):
    tensors = {**batch(B=6, T=301), "mask": padded_mask(6, 301)}
    plain = run_all(tensors, **EVERYTHING, impl=impl)
    named = run_all(tensors, **EVERYTHING, weights=None, ratio="token", objective="clip", impl=impl)
    ones = run_all(tensors, **EVERYTHING, weights=torch.ones(6, 301, dtype=WIDE), impl=impl)
    for other in (named, ones):
        assert all(map(torch.equal, plain, other))


@each_impl
@each_ratio
@each_objective
def test_what_stands_under_the_mask_never_travels(impl, ratio, objective):
    """One row is masked, one has one token."""
    clean = batch(B=4, T=6, dtype=torch.float32, weighted=True)
    mask = clean["mask"]
    mask[1], mask[2] = False, torch.arange(6) == 3
    dirty = {k: x.detach().masked_fill(~mask, math.nan) for k, x in clean.items() if k != "mask"}
    options = options_of(ratio, objective, impl=impl)
    one, other = run_all(clean, **options), run_all({**dirty, "mask": mask}, **options)
    assert all(map(torch.equal, one, other))
    assert all((x[~mask] == 0).all() for x in other[2:])
    assert other[0].isfinite()


@each_impl
@each_ratio
@each_objective
def test_a_row_of_one_token_has_its_ratio(impl, ratio, objective):
    tensors = {
        **batch(B=5, T=7, weighted=True),
        "mask": torch.arange(7) == torch.arange(5)[:, None],
    }
    one, other = (
        run_all(tensors, **options_of(x, objective, aggregation="token-mean"), impl=impl)
        for x in ("token", ratio)
    )
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance(1e-13, 1e-6), atol=0)


@each_impl
@each_ratio
@each_objective
def test_splitting_a_step_changes_nothing(impl, ratio, objective):
    tensors = batch(B=6, T=7, weighted=True)
    tensors["mask"][3] = False
    leaves = [tensors[name] for name in LEAVES]
    options = options_of(ratio, objective, normalizer=torch.tensor(11), impl=impl)
    whole = ppo_loss(**tensors, **options)
    parts = [
        ppo_loss(**{k: x[rows] for k, x in tensors.items()}, **options)
        for rows in (slice(0, 3), slice(3, 4), slice(4, 6))
    ]
    loss = sum(part.loss for part in parts)
    limits = {"rtol": tolerance(1e-13, 1e-6), "atol": tolerance(1e-15, 1e-7)}
    torch.testing.assert_close(loss, whole.loss, **limits)
    expected = torch.autograd.grad(whole.loss, leaves)
    for x, y in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(x, y, **limits)
    merged = merge_stats(PPO_STATS, [part.metrics for part in parts])
    torch.testing.assert_close(merged, whole.metrics, rtol=1e-6, atol=1e-6)


@each_impl
@each_ratio
@each_objective
def test_bits_do_not_depend_on_threads_or_other_rows(impl, ratio, objective):
    B, T = (5, 301) if impl == "triton" else (37, 700)
    tensors = {**batch(B=B, T=T, scale=0.02, weighted=True), "mask": padded_mask(B, T)}
    options = options_of(ratio, objective, impl=impl)
    if impl == "cpp":
        assert_same_bits_with_any_number_of_threads(lambda: run_all(tensors, **options))
    _, _, *whole = run_all(tensors, **options)
    for b in (0, 1, 2, B - 1):
        _, _, *alone = run_all({k: x[b : b + 1] for k, x in tensors.items()}, **options)
        assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, whole, strict=True))


@each_impl
@pytest.mark.parametrize(
    ("ratio", "aggregation"),
    [("sequence", "seq-mean-token-mean"), ("sequence-product", "seq-mean-token-sum")],
)
@pytest.mark.parametrize("objective", ["clip", "mask"])
def test_the_gradient_is_that_of_the_objective_of_sequences(impl, ratio, aggregation, objective):
    """GSPO's and RLOO's, where a sequence has one advantage; by autograd on their own formulas."""
    tensors = {**batch(seed=4, B=40, T=6, scale=0.3), "mask": padded_mask(40, 6)}
    tensors["mask"][1, 2] = True  # no row is empty
    tensors["mask"][:, 0] = True
    advantages = torch.randn(40, 1, generator=generator(5), dtype=WIDE)
    tensors["advantages"] = advantages.expand(40, 6)
    loss = ppo_loss(
        **tensors,
        ratio=ratio,
        objective=objective,
        aggregation=aggregation,
        normalizer=40,
        impl=impl,
    ).loss
    (gradient,) = torch.autograd.grad(loss, tensors["logprobs"])

    logprobs = tensors["logprobs"].detach().double().requires_grad_()
    of_tokens = (logprobs - tensors["old_logprobs"].double()) * tensors["mask"]
    of_rows = of_tokens.sum(-1)
    if ratio == "sequence":
        of_rows = of_rows / tensors["mask"].sum(-1)
    s, a = of_rows.exp(), advantages[:, 0].double()
    if objective == "clip":
        value = torch.minimum(s * a, s.clamp(0.8, 1.2) * a)
    else:
        value = torch.where((s >= 0.8) & (s <= 1.2), s * a, 0)
    (expected,) = torch.autograd.grad(-value.mean(), logprobs)
    assert 0 < (expected == 0).all(-1).sum() < 40, "some sequences are clipped"
    limit = tolerance(1e-13, 1e-6)
    torch.testing.assert_close(gradient.double(), expected, rtol=limit, atol=limit)


@each_impl
@pytest.mark.parametrize("objective", ["clip", "mask"])
@each_ratio
def test_the_reference_is_differentiated_twice(impl, objective, ratio):
    """A ratio is its own derivative, and so is the slope of a loss that is not clipped."""
    tensors = batch(B=2, T=3, valid=2.0, scale=0.01)
    loss = ppo_loss(**tensors, ratio=ratio, objective=objective, impl=impl).loss
    (slope,) = torch.autograd.grad(loss, tensors["logprobs"], create_graph=True)
    if impl != "reference":
        with pytest.raises(RuntimeError, match="ppo_loss: its kernels compute no second"):
            torch.autograd.grad(slope.sum(), tensors["logprobs"])
        return
    assert (slope != 0).all()
    (curve,) = torch.autograd.grad(slope.sum(), tensors["logprobs"])
    torch.testing.assert_close(curve, slope.detach())


@each_impl
@each_ratio
@pytest.mark.parametrize("advantage", [-2.0, 0.0, 2.0])
@pytest.mark.parametrize("log_ratio", [1e4, -1e4, math.inf, -math.inf])
def test_extreme_ratios(impl, ratio, advantage, log_ratio):
    for objective in ("cispo", "mask"):
        if objective == "cispo" and math.isinf(log_ratio):
            continue  # the log-prob is a factor of the loss
        tensors = tokens([log_ratio], advantage)
        loss, metrics = ppo_loss(**tensors, ratio=ratio, objective=objective, impl=impl)
        loss.backward()
        clamped = (1.2 if log_ratio > 0 else 0.8) if objective == "cispo" else 0.0
        slope = -clamped * advantage
        expected = slope * log_ratio if slope else 0.0
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        assert tensors["logprobs"].grad.item() == pytest.approx(slope, rel=1e-6)
        side = "clipped_high" if log_ratio > 0 else "clipped_low"
        assert counts(metrics)["clipped_high"] + counts(metrics)["clipped_low"] == 1
        assert counts(metrics)[side] == 1


@each_impl
@pytest.mark.parametrize("objective", ["cispo", "mask"])
@pytest.mark.parametrize("side", [-1.0, 1.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_a_token_on_a_bound_is_inside(impl, objective, side, advantage):
    """log r is the bound as float32 holds it, and the numbers next to it on either side."""
    on = torch.tensor(math.log(1.5 if side > 0 else 0.75))
    near = [torch.nextafter(on, on - k * side).item() for k in (1.0, -1.0)]
    tensors = tokens([near[0], on.item(), near[1]], advantage)
    loss, metrics = ppo_loss(**tensors, objective=objective, clip=(0.25, 0.5), impl=impl)
    loss.backward()
    assert counts(metrics)["clipped_high"] == (side > 0)
    assert counts(metrics)["clipped_low"] == (side < 0)
    kept = [True, True, objective == "cispo"]
    assert (tensors["logprobs"].grad != 0).tolist() == [kept]


@each_impl
def test_ratios_of_sequences_leave_the_metrics_of_tokens(impl):
    tensors = batch(B=4, T=9)
    one, other, product = (
        counts(ppo_loss(**tensors, ratio=ratio, impl=impl).metrics) for ratio in RATIOS
    )
    of_tokens = [name for name in one if "clip" not in name and name != "policy_loss"]
    for name in of_tokens:
        assert one[name] == other[name] == product[name], name
    clipped = [x["clipped_high"] + x["clipped_low"] for x in (one, other, product)]
    assert clipped[0] > clipped[1]
    assert clipped[2] > clipped[1]


@each_impl
@each_ratio
@each_objective
def test_weights_scale_the_policy_term_alone(impl, ratio, objective):
    tensors = batch(B=4, T=9)
    options = options_of(ratio, objective, impl=impl)
    none = {"kl_coef": 0.0, "entropy_coef": 0.0}
    twice, zero = (torch.full((4, 9), x, dtype=WIDE, requires_grad=True) for x in (2.0, 0.0))
    plain = ppo_loss(**tensors, **options)
    policy = ppo_loss(**tensors, **options | none)
    weighted = ppo_loss(**tensors, weights=twice, **options)
    without = ppo_loss(**tensors, weights=zero, **options)
    limits = {"rtol": tolerance(1e-13, 1e-6), "atol": tolerance(1e-14, 1e-6)}
    torch.testing.assert_close(weighted.loss - plain.loss, policy.loss, **limits)
    torch.testing.assert_close(plain.loss - without.loss, policy.loss, **limits)
    slopes = []
    for x in (plain, policy, weighted):
        x.loss.backward()
        slopes.append(tensors["logprobs"].grad)
        tensors["logprobs"].grad = None
    torch.testing.assert_close(slopes[2] - slopes[0], slopes[1], **limits)
    assert twice.grad is None
    assert counts(weighted.metrics)["policy_loss"] == pytest.approx(
        2 * counts(plain.metrics)["policy_loss"], rel=1e-6
    )
    same = [name for name in PPO_STATS if name != "policy_loss"]
    assert [counts(x.metrics)[n] for x in (weighted, without) for n in same] == 2 * [
        counts(plain.metrics)[n] for n in same
    ]


@each_impl
@each_objective
def test_a_token_of_weight_zero_may_have_any_ratio(impl, objective):
    weights = torch.tensor([[0.0, 1.0]])
    tensors = tokens([1000.0, 0.1], -1.0, weights=weights)
    loss = ppo_loss(**tensors, objective=objective, normalizer=1, impl=impl).loss
    loss.backward()
    alone = tokens([0.1], -1.0)
    expected = ppo_loss(**alone, objective=objective, normalizer=1, impl=impl).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(tensors["logprobs"].grad[0, 1:], alone["logprobs"].grad[0])
    assert tensors["logprobs"].grad[0, 0] == 0


@each_impl
@each_ratio
@each_objective
@pytest.mark.parametrize("given", ["logprobs", "weights", "advantages"])
def test_a_nan_at_a_valid_token_shows(impl, ratio, objective, given):
    tensors = batch(B=3, T=40, valid=2.0, scale=0.01, weighted=True)
    with torch.no_grad():
        tensors["weights"] += 0.5
        tensors[given][1, 17] = math.nan
    loss, metrics = ppo_loss(**tensors, **options_of(ratio, objective), impl=impl)
    assert loss.isnan()
    assert math.isnan(counts(metrics)["policy_loss"])
