"""gae: the C++ kernel against Python loops over T."""

import eager
import pytest
import torch

from ppo_fast.ops import gae

SIZES = [(64, 512), (8, 128), (1024, 1024)]


@pytest.mark.parametrize(("rows", "steps"), SIZES, ids=[f"{b}x{t}" for b, t in SIZES])
def test_gae(turns, rows, steps):
    rewards, values = torch.randn(2, rows, steps)
    lengths = torch.randint(1, steps + 1, (rows,))
    mask = torch.arange(steps) < lengths[:, None]

    def ours(impl):
        return gae(rewards, values, mask=mask, gamma=1.0, lam=0.95, impl=impl)

    sides = {
        "ppo_fast": lambda: ours("cpp"),
        "Python loop over T with mask: the reference": lambda: ours("reference"),
        "Python loop over T, no mask": lambda: eager.loop_over_steps(rewards, values, 1.0, 0.95),
    }
    turns(f"gae, {rows} x {steps}, ragged mask", sides, rounds=25)
