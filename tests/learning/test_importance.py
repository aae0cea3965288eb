"""Importance weights and mismatch metrics, against loops over tokens in plain Python."""

from __future__ import annotations

from math import exp, expm1, prod

import pytest
import torch

from ppo_fast.learning.importance import highest, importance_weights, mismatch_metrics

KINDS = ["truncate", "mask", "sequence-mask", "sequence-truncate"]
BOUNDS = (0.5, 1.5)


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-ratios [B, T] with NaN outside of the mask, in which a row has no token."""
    generator = torch.Generator().manual_seed(seed)
    log_ratios = torch.randn(7, 11, generator=generator, dtype=torch.float64) * 0.5
    mask = torch.rand(7, 11, generator=generator) < 0.7
    mask[3] = False
    return log_ratios.masked_fill(~mask, torch.nan), mask


def expected(row: list[float], kind: str) -> list[float]:
    low, high = BOUNDS
    weights = [exp(x) for x in row]
    if kind == "truncate":
        return [min(max(w, low), high) for w in weights]
    if kind == "mask":
        return [w if low <= w <= high else 0.0 for w in weights]
    if kind == "sequence-mask":
        kept = low <= prod(weights) ** (1 / len(weights)) <= high
        return [w if kept else 0.0 for w in weights]
    return [min(max(prod(weights), low), high)] * len(weights)


@pytest.mark.parametrize("kind", KINDS)
def test_weights(kind):
    kept = 0
    for seed in range(20):
        log_ratios, mask = case(seed)
        found = importance_weights(log_ratios, mask, kind, BOUNDS)
        assert (found[~mask] == 0).all()
        for row, valid, weights in zip(log_ratios, mask, found, strict=True):
            if valid.any():
                want = expected(row[valid].tolist(), kind)
                assert weights[valid].tolist() == pytest.approx(want, rel=1e-12)
                kept += weights.any().item()
    assert kept > 20


@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions_have_weights_of_one(kind):
    mask = torch.rand(4, 6) < 0.6
    found = importance_weights(torch.zeros(4, 6), mask, kind, BOUNDS)
    assert torch.equal(found, mask.float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("far", [-1e4, 1e4])
def test_extreme_ratios_give_finite_weights(kind, far):
    found = importance_weights(torch.full((2, 3), far), torch.ones(2, 3) > 0, kind, (0.0, 2.0))
    assert found.isfinite().all()
    assert (found <= 2.0).all()


def test_mismatch_metrics():
    log_ratios, mask = case()
    found, x = mismatch_metrics(log_ratios, mask), log_ratios[mask].tolist()
    w = [exp(v) for v in x]
    assert found == pytest.approx(
        {
            "sampling_log_ratio_max": max(map(abs, x)),
            "sampling_kl": -sum(x) / len(x),
            "sampling_kl_k3": sum(expm1(v) - v for v in x) / len(x),
            "effective_sample_size": sum(w) ** 2 / sum(v * v for v in w) / len(w),
        }
    )
    assert mismatch_metrics(torch.zeros(2, 3), torch.ones(2, 3) > 0) == {
        "sampling_log_ratio_max": 0.0,
        "sampling_kl": 0.0,
        "sampling_kl_k3": 0.0,
        "effective_sample_size": 1.0,
    }
    assert mismatch_metrics(torch.zeros(2, 3), torch.zeros(2, 3) > 0) == {}


def test_the_highest_share_of_the_tokens():
    values = torch.tensor([[5.0, 1.0, 9.0], [7.0, 3.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert highest(values, mask, 0.4).tolist() == [[False, False, True], [True, False, False]]
    assert torch.equal(highest(values, mask, 1.0), mask)
    assert highest(values, mask, 0.01).sum() == 1, "at least one"
    assert not highest(values, torch.zeros_like(mask), 0.5).any()


def test_a_product_of_extreme_ratios():
    log_ratios = torch.tensor([[25.0, -24.0, -1.5]], dtype=torch.float64)
    found = importance_weights(log_ratios, torch.ones(1, 3) > 0, "sequence-truncate", (0.0, 2.0))
    assert found[0].tolist() == pytest.approx([exp(-0.5)] * 3)
