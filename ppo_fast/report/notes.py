"""The meaning of each metric, and the range in which a healthy run keeps it.

metrics.json holds the table of docs/metrics.md; ``tests/helpers/metric_notes.py`` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from ppo_fast.report.courses import Course
from ppo_fast.runs.bounds import FIRST, FROM_STEP, HIGHEST, LEAST_SHARE, LOWEST


class Note(NamedTuple):
    """A metric's meaning, and when to look closer; each may be empty."""

    meaning: str
    look: str


@cache
def _table() -> dict[str, Note]:
    rows = json.loads(files("ppo_fast.report").joinpath("metrics.json").read_text("utf-8"))
    return {name: Note(row["meaning"], row["look"]) for row in rows for name in row["names"]}


def note_of(metric: str) -> Note:
    """Return the note of a metric; an empty one for a metric that the table has not."""
    if metric.startswith("reward/"):
        metric = f"reward/<name>/{metric.rpartition('/')[2]}"
    return _table().get(metric, Note("", ""))


class Healthy(NamedTuple):
    """Bounds within which a metric of a run that goes well lies.

    low, high: None: no bound on that side.
    start: the step from which on it is looked at.
    share: of the metric's first values, which the lowest bound is; None: it is a fixed number.
    """

    low: float | None
    high: float | None
    start: int = 1
    share: float | None = None

    def __str__(self) -> str:
        parts = []
        if self.share is not None:
            parts.append(f"above {self.share:.0%} of where it began")
        elif self.low is not None:
            parts.append(f"above {self.low:.3g}")
        if self.high is not None:
            parts.append(f"below {self.high:.3g}")
        late = f", from step {self.start} on" if self.start > 1 else ""
        return " and ".join(parts) + late


def healthy(metric: str, course: Course) -> Healthy | None:
    """Return the bounds of a metric in one run; None where nothing is expected of it."""
    low, high = LOWEST.get(metric), HIGHEST.get(metric)
    if metric in LEAST_SHARE and len(course):
        low = LEAST_SHARE[metric] * _mean(course.values[:FIRST])
    if low is None and high is None:
        return None
    return Healthy(low, high, FROM_STEP.get(metric, 1), LEAST_SHARE.get(metric))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
