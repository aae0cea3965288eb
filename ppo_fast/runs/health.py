"""Warn, once each, of metrics that leave the range of a run that goes well."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ppo_fast.data.evaluated import Evaluated
from ppo_fast.data.step import Step
from ppo_fast.runs.bounds import FIRST, FROM_STEP, HIGHEST, LEAST_SHARE, LOWEST
from ppo_fast.runs.callbacks import Callback

logger = logging.getLogger(__name__)

# Returns what is wrong with a metric's course so far, or None.
Wrong = Callable[[Sequence[float]], str | None]

LAST = 10  # steps of the mean that is looked at


class Range(NamedTuple):
    """A check that a metric stays in its expected range.

    metric: its name.
    steps: from which step on it is looked at.
    wrong: takes the metric's course so far, and returns what is wrong with it, or None.
    mend: what to do about it.
    """

    metric: str
    steps: int
    wrong: Wrong
    mend: str


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _mean_is_low(metric: str) -> Wrong:
    def wrong(course: Sequence[float]) -> str | None:
        mean = _mean(course[-LAST:])
        return f"is {mean:.2f} in the mean of {LAST} steps" if mean < LOWEST[metric] else None

    return wrong


def _mean_is_high(metric: str) -> Wrong:
    def wrong(course: Sequence[float]) -> str | None:
        mean = _mean(course[-FIRST:])
        return f"is {mean:.2f} in the mean of {FIRST} steps" if mean > HIGHEST[metric] else None

    return wrong


def _is_high(metric: str) -> Wrong:
    def wrong(course: Sequence[float]) -> str | None:
        return f"is {course[-1]:.0f} nats" if course[-1] > HIGHEST[metric] else None

    return wrong


def _fell(metric: str) -> Wrong:
    def wrong(course: Sequence[float]) -> str | None:
        first, last = _mean(course[:FIRST]), _mean(course[-FIRST:])
        low = last < LEAST_SHARE[metric] * first
        return f"fell from {first:.3g} to {last:.3g}" if low else None

    return wrong


def _stays_at_0(steps: int) -> Wrong:
    def wrong(course: Sequence[float]) -> str | None:
        return f"is 0 for {steps} steps" if not any(course[-steps:]) else None

    return wrong


RANGES = (
    Range(
        "explained_variance",
        FROM_STEP["explained_variance"],
        _mean_is_low("explained_variance"),
        "the values are worse than a constant: raise value_learning_rate, or try another critic",
    ),
    Range(
        "kl_sequence",
        1,
        _is_high("kl_sequence"),
        "the policy runs away from its reference: raise kl_penalty",
    ),
    Range(
        "clip_fraction",
        FIRST,
        _mean_is_high("clip_fraction"),
        "the policy moves far in a step: lower learning_rate, or num_epochs",
    ),
    Range(
        "entropy",
        FROM_STEP["entropy"],
        _fell("entropy"),
        "the samples become one and the same: raise kl_penalty, or add entropy_coef",
    ),
    Range(
        "response_length",
        FROM_STEP["response_length"],
        _fell("response_length"),
        "the responses shrink: look at the samples, and at what the reward pays for",
    ),
    Range(
        "reward_std",
        FIRST,
        _stays_at_0(FIRST),
        "equal rewards teach nothing: look at the reward, or take other prompts",
    ),
    Range(
        "finished_fraction",
        LAST,
        _stays_at_0(LAST),
        "every response is cut off: raise max_length, or missing_eos_penalty",
    ),
)


class Health(Callback):
    """Looks at a run's metrics after every step, and warns once of each that leaves its range.

    Args:
        best: metric of the evaluations that is looked at.
        lower_is_better: whether it is to fall; rewards of training are then not compared with it.
    """

    def __init__(self, best: str = "reward", *, lower_is_better: bool = False) -> None:
        self._best = None if lower_is_better or not best.startswith("reward") else best
        self._courses: dict[str, list[float]] = defaultdict(list)
        self._said: set[str] = set()
        self._evaluations: list[tuple[float, float, float]] = []
        self._rewards: list[float] = []

    def on_step(self, step: Step) -> None:
        self._rewards.append(step.metrics["mean_reward"])
        lone = {"reward_std"} if len(step.scores) < 2 else set()  # one score has no deviation
        self.note({name: value for name, value in step.metrics.items() if name not in lone})

    def on_evaluate(self, evaluated: Evaluated) -> None:
        """Warn where the reward of held-out prompts falls while that of training rises."""
        if not self._rewards or self._best is None:
            return
        held_out, error = (evaluated.metrics[name] for name in (self._best, "standard_error"))
        trained, self._rewards = _mean(self._rewards), []
        before = max(self._evaluations, default=None)
        self._evaluations.append((held_out, error, trained))
        if before is None or "held-out" in self._said:
            return
        if held_out + 2 * (error + before[1]) < before[0] and trained > before[2]:
            self._said.add("held-out")
            logger.warning(
                "the reward of held-out prompts fell from %.3g to %.3g, while that of training "
                "rose from %.3g to %.3g; the policy learns its prompts by heart, or what pleases "
                "the reward alone: go back to the best checkpoint, raise kl_penalty, or take more "
                "prompts",
                before[0],
                held_out,
                before[2],
                trained,
            )

    def note(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one more step."""
        for one in RANGES:
            if one.metric not in metrics:
                continue
            course = self._courses[one.metric]
            course.append(metrics[one.metric])
            if one.metric in self._said or len(course) < one.steps:
                continue
            if (wrong := one.wrong(course)) is not None:
                self._said.add(one.metric)
                logger.warning("%s %s; %s", one.metric, wrong, one.mend)
