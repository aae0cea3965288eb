"""torchrl's generalised advantage estimation against gae, in one process."""

import pytest
import torch

from ppo_fast.ops import gae

functional = pytest.importorskip("torchrl.objectives.value.functional")

SIZES = [(64, 512), (8, 128), (1024, 1024)]


@pytest.mark.parametrize(("rows", "steps"), SIZES, ids=[f"{b}x{t}" for b, t in SIZES])
def test_gae(turns, rows, steps):
    """Use rows of full length, since torchrl has no mask; the last step ends the episode."""
    rewards, values = torch.randn(2, rows, steps)
    dones = torch.zeros(rows, steps, dtype=torch.bool)
    dones[:, -1] = True
    next_values = torch.cat([values[:, 1:], torch.zeros(rows, 1)], dim=1)
    arguments = [x.unsqueeze(-1) for x in (values, next_values, rewards, dones)]

    def ours():
        return gae(rewards, values, dones=dones, gamma=1.0, lam=0.95, impl="cpp")

    def vectorised():
        return functional.vec_generalized_advantage_estimate(1.0, 0.95, *arguments)

    def by_loop():
        return functional.generalized_advantage_estimate(1.0, 0.95, *arguments)

    torch.testing.assert_close(ours().advantages, vectorised()[0][..., 0], atol=1e-4, rtol=1e-4)
    sides = {
        "ppo_fast": ours,
        "torchrl, vec_generalized_advantage_estimate": vectorised,
        "torchrl, generalized_advantage_estimate": by_loop,
    }
    turns(f"gae, {rows} x {steps}", sides, rounds=25)
