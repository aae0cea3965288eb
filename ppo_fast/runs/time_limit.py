"""End a run in time for the limit of a queue."""

from __future__ import annotations

import math
import time

from ppo_fast.checks import is_whole


class TimeLimit:
    """Says when no further step fits into the time of a run.

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
        self._seconds = seconds
        self._started = self._last = time.monotonic()
        self._longest = 0.0

    def step_done(self) -> None:
        """Note that a step, and what is written after it, is done."""
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now

    @property
    def reached(self) -> bool:
        """Whether a step as long as the longest so far would end after the limit."""
        return (
            self._seconds is not None and self._last + self._longest > self._started + self._seconds
        )


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
