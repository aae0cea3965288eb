"""Merged metrics are those of all tokens together, and are read with one copy to the host."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from ppo_fast.ops.ppo_loss import ppo_loss
from ppo_fast.ops.stats import (
    PPO_STATS,
    VALUE_STATS,
    merge_stats,
    pack_stats,
    ppo_metrics,
    value_metrics,
)
from ppo_fast.ops.value_loss import value_loss

PPO_KEYS = [
    "tokens",
    "policy_loss",
    "kl_loss",
    "ref_kl",
    "entropy",
    "approx_kl",
    "approx_kl_k3",
    "clip_fraction",
    "clip_fraction_high",
    "clip_fraction_low",
    "dual_clip_fraction",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "max_log_ratio",
]
VALUE_KEYS = [
    "value_loss",
    "value_clip_fraction",
    "value_mean",
    "return_mean",
    "explained_variance",
    "value_min",
    "value_max",
]


def packed(layout, **stats):
    return pack_stats(layout, {k: torch.tensor(float(stats.get(k, 0))) for k in layout})


def value_stats(values, returns):
    values, returns = torch.tensor([values]), torch.tensor([returns])
    mask = torch.ones_like(values, dtype=torch.bool)
    return value_loss(values, old_values=None, returns=returns, mask=mask).metrics


@pytest.mark.parametrize(
    "layout",
    [PPO_STATS, VALUE_STATS, {"a": "max", "b": "sum", "c": "max", "d": "min", "e": "sum"}],
)
def test_merge_is_per_entry(layout):
    stats = [torch.randn(len(layout)) for _ in range(3)]
    merged = merge_stats(layout, stats).tolist()
    combine = {"sum": math.fsum, "min": min, "max": max}
    for i, reduction in enumerate(layout.values()):
        assert merged[i] == pytest.approx(combine[reduction](s[i].item() for s in stats), rel=1e-5)


@pytest.mark.parametrize("layout", [PPO_STATS, VALUE_STATS])
def test_merge_of_one_and_on_meta(layout):
    stats = torch.randn(len(layout))
    assert torch.equal(merge_stats(layout, [stats]), stats)
    merged = merge_stats(layout, [stats.to("meta")] * 2)
    assert merged.shape == stats.shape
    assert merged.device.type == "meta"


def test_a_call_without_tokens_merges_neutrally():
    x = torch.randn(2, 3)
    none, full = torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    for layout, run in (
        (PPO_STATS, lambda m: ppo_loss(x, old_logprobs=-x, advantages=x, mask=m)),
        (VALUE_STATS, lambda m: value_loss(x, old_values=None, returns=-x, mask=m)),
    ):
        whole = run(full).metrics
        assert torch.equal(merge_stats(layout, [run(none).metrics, whole]), whole)
        empty = dict(zip(layout, run(none).metrics.tolist(), strict=True))
        neutral = {"sum": 0.0, "min": math.inf, "max": -math.inf}
        assert empty == {name: neutral[reduction] for name, reduction in layout.items()}


def test_merge_refuses_other_sizes():
    with pytest.raises(ValueError, match=r"got \[\]"):
        merge_stats(PPO_STATS, [])
    with pytest.raises(ValueError, match=rf"\[{len(PPO_STATS)}\], got \[\[{len(VALUE_STATS)}\]\]"):
        merge_stats(PPO_STATS, [torch.zeros(len(VALUE_STATS))])
    for read in (ppo_metrics, value_metrics):
        with pytest.raises(ValueError, match=r"got shape \[3\]"):
            read(torch.zeros(3))


def test_ppo_metrics_are_the_means():
    stats = packed(
        PPO_STATS,
        tokens=8,
        policy_loss=4,
        kl_loss=2,
        ref_kl=-6,
        entropy=20,
        approx_kl=1,
        approx_kl_k3=0.5,
        clipped_high=3,
        clipped_low=2,
        dual_clipped=1,
        ratio=10,
        ratio_min=0.25,
        ratio_max=4,
        max_log_ratio=1.5,
    )
    assert ppo_metrics(stats) == {
        "tokens": 8.0,
        "policy_loss": 0.5,
        "kl_loss": 0.25,
        "ref_kl": -0.75,
        "entropy": 2.5,
        "approx_kl": 0.125,
        "approx_kl_k3": 0.0625,
        "clip_fraction": 0.625,
        "clip_fraction_high": 0.375,
        "clip_fraction_low": 0.25,
        "dual_clip_fraction": 0.125,
        "ratio_mean": 1.25,
        "ratio_min": 0.25,
        "ratio_max": 4.0,
        "max_log_ratio": 1.5,
    }


def test_value_metrics_against_the_statistics_module():
    g = torch.Generator().manual_seed(0)
    returns = (torch.randn(40, generator=g) + 3).tolist()
    values = [
        r + 0.5 * x for r, x in zip(returns, torch.randn(40, generator=g).tolist(), strict=True)
    ]
    metrics = value_metrics(value_stats(values, returns))
    residual = [r - v for v, r in zip(values, returns, strict=True)]
    explained = 1 - statistics.pvariance(residual) / statistics.pvariance(returns)
    expected = {
        "value_loss": statistics.mean(0.5 * x * x for x in residual),
        "value_clip_fraction": 0.0,
        "value_mean": statistics.mean(values),
        "return_mean": statistics.mean(returns),
        "explained_variance": explained,
        "value_min": min(values),
        "value_max": max(values),
    }
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_explained_variance_of_known_predictors():
    returns = [1.0, 4.0, -2.0, 7.0]

    def explained(values, returns):
        return value_metrics(value_stats(values, returns))["explained_variance"]

    assert explained(returns, returns) == 1
    assert explained([r + 5 for r in returns], returns) == pytest.approx(1)
    assert explained([2.5] * 4, returns) == pytest.approx(0)
    assert explained([-r for r in returns], returns) == pytest.approx(-3)
    for constant in (0.1, 12.3, 1234.5678, -7e4):  # sums in float32 leave some of them a variance
        assert explained([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [constant] * 7) == 0.0


@pytest.mark.parametrize(
    ("read", "layout", "keys"),
    [(ppo_metrics, PPO_STATS, PPO_KEYS), (value_metrics, VALUE_STATS, VALUE_KEYS)],
)
def test_readers_give_plain_floats_with_one_host_copy(read, layout, keys, monkeypatch):
    copies = []
    to_list = Tensor.tolist

    def refuse(*_):
        raise AssertionError("a second host copy")

    monkeypatch.setattr(Tensor, "tolist", lambda x: copies.append(1) or to_list(x))
    for name in ("item", "__float__", "__bool__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, refuse)
    some = read(packed(layout, tokens=3, returns_squared=5))
    nothing = read(packed(layout, **{k: math.inf for k, r in layout.items() if r == "min"}))
    monkeypatch.undo()
    assert len(copies) == 2
    assert list(some) == keys
    assert all(type(x) is float for x in some.values())
    assert nothing == dict.fromkeys(keys, 0.0)


def test_pack_keeps_the_order_of_the_layout():
    shuffled = {name: torch.tensor(i) for i, name in reversed(list(enumerate(PPO_STATS)))}
    stats = pack_stats(PPO_STATS, shuffled)
    assert stats.tolist() == list(range(len(PPO_STATS)))
    assert stats.dtype == torch.float32
