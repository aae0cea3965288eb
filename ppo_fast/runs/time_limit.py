"""End a run in time for the limit of a queue."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ppo_fast.checks import is_whole


class TimeLimit:
    """Says whether a further step fits into the time of a run; the first one always does.

    Args:
        seconds: from now; None: there is no limit.

    Raises:
        ValueError: they are no positive number.
    """

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and not (
            (is_whole(seconds) or isinstance(seconds, float)) and 0 < seconds < float("inf")
        ):
            raise ValueError(f"max_time: got {seconds!r}, expected seconds above 0, or None")
        self._ends = None if seconds is None else time.monotonic() + seconds
        self._step: float | None = None  # the longest, without its evaluation
        self._evaluation = 0.0  # the longest
        self._began, self._within = time.monotonic(), 0.0

    def begin_step(self) -> None:
        """Note that a step begins."""
        self._began, self._within = time.monotonic(), 0.0

    def step_done(self) -> None:
        """Note that a step, and what is written after it, is done."""
        seconds = time.monotonic() - self._began - self._within
        self._step = max(self._step or 0.0, seconds)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Measure the block as an evaluation."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self._evaluation, self._within = max(self._evaluation, seconds), self._within + seconds

    def fits(self, *, evaluates: bool) -> bool:
        """Return whether a step as long as the longest so far would end in time.

        Args:
            evaluates: whether an evaluation follows it.
        """
        if self._ends is None or self._step is None:
            return True
        seconds = self._step + (self._evaluation if evaluates else 0.0)
        return time.monotonic() + seconds <= self._ends


def seconds_of(text: str) -> float:
    """Return the seconds of "90", "1:30" (minutes) or "2:00:00" (hours).

    Raises:
        ValueError: it is no such text.
    """
    parts = text.split(":")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or min(numbers) < 0 or not 0 < sum(numbers) < math.inf:
        raise ValueError(f"max_time: got {text!r}, expected seconds, MM:SS or HH:MM:SS")
    return sum(n * 60**power for power, n in enumerate(reversed(numbers)))
