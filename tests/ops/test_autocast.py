"""Autocast around an op does not change the dtype that it computes in."""

from __future__ import annotations

import pytest
import torch

from ppo_fast.ops import decode_attention, few_row_linear


@pytest.mark.parametrize("rows", [1, 128, 129])
@pytest.mark.parametrize("impl", ["auto", "reference", "cpp"])
def test_few_row_linear(rows, impl):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 24, generator=g), torch.randn(9, 24, generator=g)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    expected = few_row_linear(x, weight, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        found = few_row_linear(*leaves, impl=impl)
    gradients = torch.autograd.grad(found.square().sum(), leaves)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    torch.testing.assert_close(gradients[0], 2 * expected @ weight, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradients[1], 2 * expected.T @ x, rtol=1e-5, atol=1e-4)


def test_decode_attention():
    g = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(*s, generator=g) for s in ((2, 4, 8), *[(2, 5, 2, 8)] * 2))
    lengths = torch.tensor([5, 2])
    expected = decode_attention(query, keys, values, lengths, scaling=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = decode_attention(query, keys, values, lengths, scaling=0.5)
    assert torch.equal(found, expected)
