"""Progress: counters of a run, and the prompts and seeds that follow from them."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from ppo_fast.data.prompts import Prompt

# Running totals, and the metric that each adds up.
TOTALS = {
    "total_reward": "mean_reward",
    "total_kl_divergence": "kl_divergence",
    "total_policy_loss": "policy_loss",
    "total_value_loss": "value_loss",
}
OUTSIDE_STEPS = 1 << 31  # number of the first sequence sampled outside of steps


class Progress:
    """Counters of a run.

    All randomness comes from the seed and these counters, so that a run resumed from a checkpoint
    goes on as if it had never stopped.

    Args:
        seed: in [0, 2**31).

    Attributes:
        stats: total_steps, and sums over steps of the metrics in TOTALS.
        prompts_drawn: number of prompts that steps took from the training set.
        sequences_sampled: number of responses that steps sampled.
        sequences_outside: number of responses sampled outside of steps. These have seeds of their
            own: an evaluation changes no later draw of the training.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.stats: dict[str, float] = {"total_steps": 0} | dict.fromkeys(TOTALS, 0.0)
        self.prompts_drawn = self.sequences_sampled = self.sequences_outside = 0

    @property
    def steps(self) -> int:
        """Number of steps done."""
        return int(self.stats["total_steps"])

    def count_step(self, metrics: dict[str, float]) -> None:
        """Count one more step, and add its metrics to the totals."""
        self.stats["total_steps"] += 1
        for name, metric in TOTALS.items():
            self.stats[name] += metrics[metric]

    def averages(self) -> dict[str, float]:
        """Return the number of steps and means over all steps so far.

        These are total_steps, avg_reward, avg_kl_divergence, avg_policy_loss and avg_value_loss.
        """
        means = {name: self.stats[name] / max(self.steps, 1) for name in TOTALS}
        return {"total_steps": self.stats["total_steps"]} | {
            name.replace("total_", "avg_"): value for name, value in means.items()
        }

    def next_prompts(self, prompts: list[Prompt], batch_size: int) -> list[Prompt]:
        """Return the next batch of an endless sequence of random permutations of ``prompts``."""
        size = min(batch_size, len(prompts))
        batch: list[Prompt] = []
        while len(batch) < size:
            round_, first = divmod(self.prompts_drawn + len(batch), len(prompts))
            generator = torch.Generator().manual_seed(self.seed_of("prompts", round_))
            order = torch.randperm(len(prompts), generator=generator, device="cpu")
            batch += [prompts[j] for j in order[first : first + size - len(batch)].tolist()]
        self.prompts_drawn += len(batch)
        return batch

    def seed_of(self, what: str, number: int) -> int:
        """Return a seed for torch's CPU generator, which reads no more than 32 bits of it."""
        return random.Random(f"{what} {self.seed} {number}").getrandbits(32)

    def step_seeds(self, count: int) -> Tensor:
        """Return the seeds [count] int64 of the next step's sequences, without counting them."""
        first = (self.seed << 32) + self.sequences_sampled
        return torch.arange(first, first + count, device="cpu")

    def next_seeds(self, count: int) -> Tensor:
        """Return the seeds [count] int64 of the next step's sequences, and count them."""
        seeds = self.step_seeds(count)
        self.sequences_sampled += count
        return seeds

    def seeds_outside(self, count: int) -> Tensor:
        """Return seeds [count] int64 for the next sequences that are sampled outside of steps."""
        first = (self.seed << 32) + OUTSIDE_STEPS + self.sequences_outside
        self.sequences_outside += count
        return torch.arange(first, first + count, device="cpu")

    def state_dict(self) -> dict[str, Any]:
        """Return the counters and the seed, for a checkpoint."""
        names = ("seed", "prompts_drawn", "sequences_sampled", "sequences_outside")
        return {"stats": dict(self.stats)} | {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the counters to those of ``state``; the seed stays."""
        self.stats = dict(state["stats"])
        self.prompts_drawn = state["prompts_drawn"]
        self.sequences_sampled = state["sequences_sampled"]
        self.sequences_outside = state.get("sequences_outside", 0)  # older files have none
