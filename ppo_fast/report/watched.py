"""Watched: the state of a run that goes on, kept from its growing files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from ppo_fast.report.courses import Courses
from ppo_fast.report.follow import MOST, Follower
from ppo_fast.report.lines import Record, as_step
from ppo_fast.report.read import read_config, read_evaluations

SAMPLES_TAIL, EVENTS_TAIL = 2**22, 2**18  # bytes
LAST_EVENTS = 3
RECENT_STEPS = 20  # whose median time a step is expected to take


class Watched:
    """State of a run; ``update`` reads what is new in its folder.

    courses, config: as in ``Run``.
    evaluations: by rising step.
    events: the last ones.
    sample: one of the newest step; None if there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.courses = Courses()
        self.config: dict[str, Any] = {}
        self.evaluations: list[Record] = []
        self.events: list[Record] = []
        self.sample: Record | None = None
        self._metrics = Follower(folder / "metrics.jsonl")
        self._samples = Follower(folder / "samples.jsonl", SAMPLES_TAIL)
        self._events = Follower(folder / "events.jsonl", EVENTS_TAIL)
        self._seen: dict[str, tuple[int, int] | None] = {}

    def update(self) -> None:
        """Read what is new."""
        for replaced, new in _all_of(self._metrics):
            if replaced:
                self.courses = Courses()
            for record in new:
                self.courses.add(record)
        for replaced, new in _all_of(self._events):
            self.events = ([] if replaced else self.events) + new
            del self.events[:-LAST_EVENTS]
        for replaced, new in _all_of(self._samples):
            if replaced or new:
                newest = new[-1]["step"] if new else None
                self.sample = next((one for one in new if one["step"] == newest), None)
        if self._changed("config.yaml"):
            self.config = read_config(self.folder)
        # each is asked, whatever the other says
        if any([self._changed("evaluations.jsonl"), self._changed("evaluation.json")]):
            self.evaluations = read_evaluations(self.folder, self.courses.step)

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run; None if config.yaml does not say."""
        return as_step(self.config.get("num_steps"))

    def seconds_a_step(self) -> float | None:
        """Return the median time of the last steps; None before the second one."""
        times = self.courses.time.values[-RECENT_STEPS - 1 :]
        passed = [after - before for before, after in pairwise(times)]
        return median(passed) if passed else None

    def seconds_left(self) -> float | None:
        """Return the time that the other steps take; None where it is not known."""
        each = self.seconds_a_step()
        if each is None or self.num_steps is None:
            return None
        return each * max(self.num_steps - self.courses.step, 0)

    def silence(self) -> float | None:
        """Return the seconds since the last step, if it is long ago for this run; else None."""
        each = self.seconds_a_step()
        if each is None or self.courses.step == self.num_steps:
            return None
        passed = time.time() - self.courses.time.values[-1]
        return passed if passed > 60 + 5 * each else None

    def _changed(self, name: str) -> bool:
        """Say whether a file is another one than at the last call."""
        try:
            found = (self.folder / name).stat()
        except OSError:
            now = None
        else:
            now = (found.st_mtime_ns, found.st_size)
        before = self._seen.get(name)
        self._seen[name] = now
        return now != before


def _all_of(follower: Follower) -> Iterator[tuple[bool, list[Record]]]:
    """Yield what is new in a file, in pieces of bounded length."""
    while True:
        replaced, new = follower.read()
        yield replaced, new
        if len(new) < MOST:
            return
