"""History: what ``train`` returns."""

from __future__ import annotations

from typing import Any

from ppo_fast.data.step import Step
from ppo_fast.runs.progress import LISTS, Progress

NAMES = ("policy_losses", "value_losses", "kl_divergences", "mean_rewards")


class History:
    """Numbers of the steps of one call of ``train``.

    Attributes:
        stopped_by: why it ended before its last step: "SIGINT", "SIGTERM", "max_time", "patience";
            None: it did not.
    """

    def __init__(self) -> None:
        self.stopped_by: str | None = None
        self._lists: dict[str, list[float]] = {name: [] for name in (*NAMES, "step_avg_rewards")}

    def note(self, step: Step) -> None:
        """Take one more step."""
        for name in NAMES:
            self._lists[name].append(step.metrics[LISTS[name]])
        rewards = self._lists["mean_rewards"]
        self._lists["step_avg_rewards"].append(sum(rewards) / len(rewards))

    def result(self, progress: Progress) -> dict[str, Any]:
        """Return the history with the run's statistics; ``PPO.train`` says what is in it."""
        statistics = progress.statistics()
        divergences = statistics["kl_divergences"]
        return {
            "training_history": self._lists,
            "final_stats": statistics,
            "final_avg_reward": statistics["avg_reward"],
            "final_kl_divergence": divergences[-1] if divergences else 0.0,
            "interrupted": self.stopped_by not in (None, "patience"),
            "stopped_by": self.stopped_by,
            "evaluations": [dict(one) for one in progress.evaluations],
        }
