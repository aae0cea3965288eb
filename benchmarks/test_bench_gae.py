"""GAE: the C++ kernel against a Python loop over T, by pytest-benchmark (`make bench`)."""

import pytest
import torch

from ppo_fast.ops import gae

SIZES = [(64, 512), (8, 128), (1024, 1024)]


@pytest.mark.parametrize("impl", ["reference", "cpp"])
@pytest.mark.parametrize(("rows", "steps"), SIZES, ids=[f"{b}x{t}" for b, t in SIZES])
def test_gae(benchmark, rows, steps, impl):
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, rows, steps, generator=generator)
    lengths = torch.randint(1, steps + 1, (rows,), generator=generator)
    mask = torch.arange(steps) < lengths[:, None]
    benchmark.group = f"gae {rows}x{steps} float32"
    benchmark(gae, rewards, values, mask=mask, gamma=1.0, lam=0.95, impl=impl)
