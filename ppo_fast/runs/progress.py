"""Progress: counters of a run, and the prompts and seeds that follow from them."""

from __future__ import annotations

import hashlib
import logging
import random
from typing import Any

import torch
from torch import Tensor

from ppo_fast.data.examples import Example, Stream, key_of

logger = logging.getLogger(__name__)

# Lists of the classic interface, with a number for each step, and the metric that is listed.
LISTS = {
    "policy_losses": "policy_loss",
    "value_losses": "value_loss",
    "kl_divergences": "kl_divergence",
    "mean_rewards": "mean_reward",
    "mean_advantages": "mean_advantage",
}
# Averages over all steps, and the list that each is the mean of.
AVERAGES = {
    "avg_policy_loss": "policy_losses",
    "avg_value_loss": "value_losses",
    "avg_kl_divergence": "kl_divergences",
    "avg_reward": "mean_rewards",
}
OUTSIDE_STEPS = 1 << 31  # number of the first sequence sampled outside of steps


class Progress:
    """Counters of a run.

    All randomness comes from the seed and these counters, so that a run resumed from a checkpoint
    goes on as if it had never stopped.

    Args:
        seed: in [0, 2**31).

    Attributes:
        stats: total_steps, and the lists of LISTS.
        prompts_drawn: number of prompts that steps took from the training set; of a stream, the
            number of its rows that were read.
        sequences_sampled: number of responses that steps sampled.
        sequences_outside: number of responses sampled outside of steps. These have seeds of their
            own: an evaluation changes no later draw of the training.
        evaluations: metrics of each evaluation of the run, and its "step".
        evaluated: a hash of what they evaluate; "": there are none.
        data: a hash of the prompts that are trained on; "": there are none yet.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.stats: dict[str, Any] = {"total_steps": 0} | {name: [] for name in LISTS}
        self.prompts_drawn = self.sequences_sampled = self.sequences_outside = 0
        self.evaluations: list[dict[str, float]] = []
        self.evaluated = self.data = ""
        self._resumed = False

    @property
    def steps(self) -> int:
        """Number of steps done."""
        return self.stats["total_steps"]

    def count_step(self, metrics: dict[str, float]) -> None:
        """Count one more step, and append its metrics to the lists."""
        self.stats["total_steps"] += 1
        for name, metric in LISTS.items():
            self.stats[name].append(metrics[metric])

    def statistics(self) -> dict[str, Any]:
        """Return a copy of ``stats``, and the AVERAGES, 0.0 before the first step."""
        means = {name: _mean(self.stats[numbers]) for name, numbers in AVERAGES.items()}
        return _copied(self.stats) | means

    def note_data(self, prompts: list[Example] | Stream) -> None:
        """Note which prompts are trained on; warn if a checkpoint's were others."""
        if isinstance(prompts, Stream):
            return
        found = digest_of(prompts)
        if self._resumed and self.data not in ("", found):
            logger.warning(
                "prompts: they are others than those that the checkpoint was trained on, so that "
                "the run goes on with another order of them"
            )
        self.data, self._resumed = found, False

    def next_prompts(self, prompts: list[Example] | Stream, batch_size: int) -> list[Example]:
        """Return the next batch of an endless sequence of random permutations of ``prompts``.

        A stream has an order of its own.
        """
        if isinstance(prompts, Stream):
            batch, read = prompts.take(self.prompts_drawn, batch_size)
            self.prompts_drawn += read
            return batch
        size = min(batch_size, len(prompts))
        batch = []
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
        counters = {name: getattr(self, name) for name in (*names, "data", "evaluated")}
        evaluations = [dict(one) for one in self.evaluations]
        return {"stats": _copied(self.stats), "evaluations": evaluations} | counters

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the counters to those of ``state``; the seed stays."""
        self.stats = _copied(state["stats"])
        if "total_reward" in self.stats:  # older files have sums over the steps
            steps = self.stats["total_steps"] = int(self.stats["total_steps"])
            for name, metric in LISTS.items():
                total = self.stats.pop(f"total_{metric.removeprefix('mean_')}", 0.0)
                self.stats[name] = [total / max(steps, 1)] * steps
        self.prompts_drawn = state["prompts_drawn"]
        self.sequences_sampled = state["sequences_sampled"]
        # older files have none of these
        self.sequences_outside = state.get("sequences_outside", 0)
        self.evaluations = [dict(one) for one in state.get("evaluations", [])]
        self.data, self.evaluated = state.get("data", ""), state.get("evaluated", "")
        self._resumed = True


def digest_of(prompts: list[Example], more: str = "") -> str:
    """Return a short hash of prompts in their order, and of ``more``."""
    digest = hashlib.sha256(more.encode())
    for example in prompts:
        digest.update(repr(key_of(example.prompt)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()[:16]


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


def _copied(stats: dict[str, Any]) -> dict[str, Any]:
    return {name: list(x) if isinstance(x, list) else x for name, x in stats.items()}
