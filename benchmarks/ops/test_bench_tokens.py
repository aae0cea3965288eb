"""whiten and kl_estimate: [64, 512]."""

import pytest
import torch
from sides import ROWS, STEPS

from ppo_fast.ops import kl_estimate, whiten


@pytest.fixture
def mask():
    return torch.arange(STEPS) < torch.randint(1, STEPS + 1, (ROWS, 1))


def test_whiten(turns, mask):
    values = torch.randn(ROWS, STEPS)

    def ours(impl):
        return whiten(values, mask=mask, impl=impl)

    def by_hand():
        n = mask.sum()
        mean = (values * mask).sum() / n
        variance = ((values - mean) ** 2 * mask).sum() / (n - 1)
        return (values - mean) * (variance + 1e-8).rsqrt() * mask

    compiled = torch.compile(ours)
    sides = {
        "ppo_fast": lambda: ours("cpp"),
        "reference": lambda: ours("reference"),
        "torch.compile of the reference": lambda: compiled("reference"),
        "eager, a product with the mask": by_hand,
    }
    turns("whiten, 64 x 512", sides, rounds=200)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimate(turns, mask, estimator):
    logprobs, ref_logprobs = (-torch.rand(ROWS, STEPS) * 5 for _ in range(2))
    grad = torch.randn(ROWS, STEPS)
    logprobs.requires_grad_()

    def ours(impl):
        return kl_estimate(logprobs, ref_logprobs, mask=mask, estimator=estimator, impl=impl)

    def by_hand():
        d = logprobs - ref_logprobs
        return (d if estimator == "k1" else torch.expm1(-d) + d) * mask

    def with_gradient(side):
        return lambda: torch.autograd.grad(side(), logprobs, grad)

    compiled = torch.compile(ours)
    sides = {
        "ppo_fast": lambda: ours("cpp"),
        "reference": lambda: ours("reference"),
        "torch.compile of the reference": lambda: compiled("reference"),
        "eager, a product with the mask": by_hand,
    }
    sides = {name: with_gradient(side) for name, side in sides.items()}
    turns(f"kl_estimate {estimator}, forward and backward, 64 x 512", sides, rounds=200)
