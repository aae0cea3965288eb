"""Courses: the values of each metric over a run's steps."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from dataclasses import dataclass, field

from ppo_fast.report.lines import Record, as_number

# Names of metrics that are kept, and characters of the longest: a bound for damaged files.
MOST_NAMES, LONGEST_NAME = 400, 120


@dataclass
class Course:
    """Values of a metric, [n] each.

    steps: rising.
    values: finite numbers; steps at which there was none are missing.
    """

    steps: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def __len__(self) -> int:
        return len(self.steps)

    def mean_of_last(self, count: int) -> float:
        """Return the mean of the last ``count`` values; the course must not be empty."""
        last = self.values[-count:]
        return sum(last) / len(last)

    def forget_from(self, step: float) -> None:
        """Drop the values of a step and of later ones."""
        index = bisect_left(self.steps, step)
        del self.steps[index:], self.values[index:]


class Courses:
    """Courses of a run's metrics; ``time`` has the seconds since 1970 at which steps ended."""

    def __init__(self) -> None:
        self.by_name: dict[str, Course] = {}
        self.time = Course()
        self.step = 0  # the last one

    def __getitem__(self, name: str) -> Course:
        return self.by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self.by_name

    def add(self, record: Record) -> None:
        """Take a line of metrics.jsonl; a step that is there already replaces it and later ones."""
        step = record["step"]
        if step <= self.step:
            for known in (self.time, *self.by_name.values()):
                known.forget_from(step)
        self.step = step
        for name, value in record.items():
            number = as_number(value)
            if name == "step" or number is None:
                continue
            if (course := self._course(name)) is not None:
                course.steps.append(step)
                course.values.append(number)

    def _course(self, name: str) -> Course | None:
        if name == "time":
            return self.time
        if name not in self.by_name:
            if len(self.by_name) >= MOST_NAMES or len(name) > LONGEST_NAME:
                return None
            self.by_name[name] = Course()
        return self.by_name[name]

    def drop_empty(self) -> None:
        """Drop the metrics that have no values."""
        self.by_name = {name: course for name, course in self.by_name.items() if len(course)}
