"""Packed sequences [total] give what padded ones [B, T] give."""

from __future__ import annotations

import pytest
import torch
from ppo_loss_truth import AGGREGATIONS, EVERYTHING
from runnable import WIDE, generator, implementations

from ppo_fast.ops import gae, kl_estimate, ppo_loss, value_loss, whiten

LENGTHS = [3, 1, 0, 7, 2]
TOTAL, B, T = sum(LENGTHS), len(LENGTHS), max(LENGTHS)
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
INSIDE = torch.arange(T) < torch.tensor(LENGTHS)[:, None]


def numbers(seed, requires_grad=False):
    x = torch.randn(TOTAL, generator=generator(seed), dtype=torch.float64).to(WIDE)
    return x.requires_grad_(requires_grad)


def mask():
    valid = torch.rand(TOTAL, generator=generator(9)) < 0.7
    valid[0] = False  # the first sequence begins with a masked token
    return valid


def padded(packed):
    out = torch.zeros(B, T, dtype=packed.dtype)
    out[INSIDE] = packed.detach()
    return out.requires_grad_(packed.requires_grad)


def assert_close(packed, rows):
    torch.testing.assert_close(packed, rows[INSIDE], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", implementations("gae"))
@pytest.mark.parametrize("masked", [True, False])
def test_gae(impl, masked):
    rewards, values = numbers(0), numbers(1)
    dones = torch.rand(TOTAL, generator=generator(2)) < 0.2
    per_row = {
        "bootstrap_value": torch.arange(1.0, B + 1, dtype=WIDE),
        "lam": torch.linspace(0.5, 1, B, dtype=WIDE),
    }
    valid = mask() if masked else torch.ones(TOTAL, dtype=torch.bool)
    found = gae(
        rewards,
        values,
        mask=valid if masked else None,
        dones=dones,
        gamma=0.9,
        cu_seqlens=CU_SEQLENS,
        impl=impl,
        **per_row,
    )
    rows = [padded(x) for x in (rewards, values)]
    expected = gae(*rows, mask=padded(valid), dones=padded(dones), gamma=0.9, impl=impl, **per_row)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == (TOTAL,)
        assert torch.equal(one, other[INSIDE])


@pytest.mark.parametrize("impl", implementations("ppo_loss"))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_ppo_loss(impl, aggregation, ratio):
    names = ["logprobs", "old_logprobs", "advantages", "entropy", "ref_logprobs", "weights"]
    packed = {name: numbers(i, name in ("logprobs", "entropy")) for i, name in enumerate(names)}
    packed["mask"] = mask()
    options = EVERYTHING | {"aggregation": aggregation, "ratio": ratio, "impl": impl}
    options["normalizer"] = 7 if aggregation == "seq-mean-token-sum" else None
    rows = {name: padded(x) for name, x in packed.items()}
    found = ppo_loss(**packed, **options, cu_seqlens=CU_SEQLENS)
    expected = ppo_loss(**rows, **options)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.metrics, expected.metrics)
    for name in ("logprobs", "entropy"):
        (gradient,) = torch.autograd.grad(found.loss, packed[name], retain_graph=True)
        (by_row,) = torch.autograd.grad(expected.loss, rows[name], retain_graph=True)
        assert_close(gradient, by_row)
    if aggregation == "seq-mean-token-mean" or ratio == "sequence":
        one_row = ppo_loss(**{k: x[None] for k, x in packed.items()}, **options).loss
        assert (one_row - found.loss).abs() > 1e-3, "one long sequence is something else"
    else:
        assert torch.equal(ppo_loss(**packed, **options).loss, found.loss)


@pytest.mark.parametrize("impl", implementations("value_loss"))
def test_value_loss(impl):
    values, old, returns = numbers(0, True), numbers(1), numbers(2)
    rows = [padded(x) for x in (values, old, returns, mask())]
    found = value_loss(values, old_values=old, returns=returns, mask=mask(), clip=0.3, impl=impl)
    expected = value_loss(
        rows[0], old_values=rows[1], returns=rows[2], mask=rows[3], clip=0.3, impl=impl
    )
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.metrics, expected.metrics)
    (gradient,) = torch.autograd.grad(found.loss, values)
    assert_close(gradient, torch.autograd.grad(expected.loss, rows[0])[0])


def check_elementwise(op):
    """Check an op of a tensor and its mask; rows do not matter to its outputs."""
    x = numbers(0, True)
    found, expected = op(x, mask()), op(padded(x), padded(mask()))
    assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    assert gradient.shape == found.shape == (TOTAL,)


@pytest.mark.parametrize("impl", implementations("whiten"))
def test_whiten(impl):
    check_elementwise(lambda x, valid: whiten(x, mask=valid, impl=impl))


@pytest.mark.parametrize("impl", implementations("kl_estimate"))
def test_kl_estimate(impl):
    check_elementwise(
        lambda x, valid: kl_estimate(x, 0.5 * x, mask=valid, estimator="k3", impl=impl)
    )


def test_no_sequence_and_no_token():
    nothing, flags = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    for cu_seqlens in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        assert gae(nothing, nothing, gamma=1.0, lam=1.0, cu_seqlens=cu_seqlens)[0].shape == (0,)
        loss = ppo_loss(
            nothing,
            old_logprobs=nothing,
            advantages=nothing,
            mask=flags,
            aggregation="seq-mean-token-mean",
            cu_seqlens=cu_seqlens,
        ).loss
        assert loss == 0


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "match"),
    [
        ([0, 5], TypeError, "cu_seqlens is list, expected .B . 1. int32 or int64 on the CPU"),
        (torch.tensor([0.0, 13.0]), TypeError, "cu_seqlens is torch.float32"),
        (torch.tensor([[0, TOTAL]]), ValueError, r"cu_seqlens is \[1, 2\]"),
        (torch.tensor([0, 5, 4, TOTAL]), ValueError, "numbers from 0 that do not fall"),
        (torch.tensor([1, TOTAL]), ValueError, "numbers from 0"),
        (torch.tensor([0, TOTAL - 1]), ValueError, r"ends at 12, .* packed as \[12\]; got \[13\]"),
        (torch.tensor([0, TOTAL], device="meta"), ValueError, r"use cu_seqlens\.cpu\(\)"),
    ],
)
def test_bad_borders(cu_seqlens, error, match):
    x = numbers(0)
    with pytest.raises(error, match=match):
        gae(x, x, gamma=1.0, lam=1.0, cu_seqlens=cu_seqlens)


def test_borders_that_are_missing_or_not_needed():
    x, valid = numbers(0), mask()
    with pytest.raises(ValueError, match="needs cu_seqlens, the borders of the sequences"):
        ppo_loss(x, old_logprobs=x, advantages=x, mask=valid, aggregation="seq-mean-token-mean")
    with pytest.raises(ValueError, match=r"ratio 'sequence' of packed .*needs cu_seqlens"):
        ppo_loss(x, old_logprobs=x, advantages=x, mask=valid, ratio="sequence")
    with pytest.raises(ValueError, match=r"expected one shape \[B, T\]"):
        gae(x, x, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match=r"got logprobs \[1, 13\]"):
        ppo_loss(
            x[None],
            old_logprobs=x[None],
            advantages=x[None],
            mask=valid[None],
            cu_seqlens=CU_SEQLENS,
        )
    with pytest.raises(ValueError, match=r"packed as \[13\]; got \[1, 13\] .* use x.squeeze\(0\)"):
        gae(x[None], x[None], gamma=1.0, lam=1.0, cu_seqlens=CU_SEQLENS)
