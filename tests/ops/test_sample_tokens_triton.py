"""The noise of the Triton kernel, word by word."""

from __future__ import annotations

import pytest
import torch
from runnable import implementations

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from ppo_fast.ops.sample_tokens.triton import gumbel_noise  # noqa: E402

EDGES = [0, 1, 2, 3, 255, 2**24 - 1, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 400, 2**32 - 1]


@triton.jit
def noise_kernel(words, noise, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(noise + i, gumbel_noise(tl.load(words + i).to(tl.uint32)))


@pytest.mark.parametrize("impl", implementations("sample_tokens"))
def test_noise_of_words(impl):
    if impl != "triton":
        pytest.skip("the C++ noise: test_noise_of_every_token, test_math.py")
    n = 2**16
    spread = 2.0 ** (torch.rand(n - len(EDGES) - 1000) * 32)
    last = 2**32 - 1000 + torch.arange(1000)
    words = torch.cat([torch.tensor(EDGES), last, spread.long().clamp(max=2**32 - 1)])
    noise = torch.empty(n)
    noise_kernel[(16,)](words, noise, BLOCK=n // 16)
    v = (words.clamp(min=1).float() * 2.0**-32).clamp(max=1 - 2.0**-24).double()
    exact = -(-torch.log1p(-v)).log()
    assert ((noise - exact).abs() <= 4e-7 + 1.2e-7 * exact.abs()).all()
