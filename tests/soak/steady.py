"""Long tiny runs in one process: memory, descriptors, threads and Python's objects stay as many."""

from __future__ import annotations

import gc
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from ppo_fast.ppo import PPO
from soak.part import Found, work_folder
from soak.tiny_runs import VARIANTS, TinyRun, place
from soak.worker import Report

STEPS, EVERY = 1000, 20
# Rise of memory that is none, in MB: the allocator's; measured from a fifth of the run on.
MEGABYTES = 8.0
# Rise of Python's objects that is none: lists of numbers grow, objects that the collector tracks do
# not, but for what is imported late and the times that rich keeps of its last 1000 steps.
OBJECTS, OF_RICH = 150, "ProgressSample"


class Measured(NamedTuple):
    """What a process has after a step."""

    step: int
    megabytes: float
    descriptors: int
    threads: int
    objects: int


class Steady:
    """Part of the soak: a case is one long run of a variant."""

    counted = "steps"

    def __init__(self, steps: int = STEPS) -> None:
        self.steps, self.target = steps, steps * len(VARIANTS)
        self._folder = work_folder("steady")
        self._place = place()

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def again(self, seed: int) -> Found:
        """Run a case again."""
        return self.case(seed)

    def case(self, seed: int) -> Found:
        """Run a variant, and compare what it has at its end with a fifth of the run."""
        variant = [*VARIANTS][seed % len(VARIANTS)]
        folder = self._folder / f"{variant}-{seed}"
        more = {"keep_last": 2, "checkpoint_freq": 10}
        run = TinyRun(variant, self._place, folder, self._folder / "output", more)
        run.output.unlink(missing_ok=True)
        ended = run.start(self.steps, before=measure_steps).wait(3600.0)
        shutil.rmtree(folder, ignore_errors=True)
        found = [_read(line) for line in ended.reports if line.startswith("at ")]
        counts: Counter[str] = Counter(steps=found[-1].step if found else 0)
        if ended.status:
            said = run.output.read_text("utf-8")[-2000:]
            return Found(counts, [f"{variant}: it ended with {ended.status}: {said}"])
        first = next(m for m in found if m.step >= self.steps // 5)
        print(f"steady, {variant}: {_words(first)}; {_words(found[-1])}")
        return Found(counts, [f"{variant}: {x}" for x in risen(first, found[-1])])


def risen(first: Measured, last: Measured) -> list[str]:
    """Return what there is more of at the end."""
    found = []
    if last.megabytes - first.megabytes > MEGABYTES:
        found.append(f"memory rose from {first.megabytes:.1f} to {last.megabytes:.1f} MB")
    if last.objects - first.objects > OBJECTS:
        found.append(f"objects rose from {first.objects} to {last.objects}")
    for name in ("descriptors", "threads"):
        before, after = getattr(first, name), getattr(last, name)
        if after > before:
            found.append(f"{name} rose from {before} to {after}")
    return found


def measure_steps(report: Report) -> None:
    """Report what this process has after every EVERY-th step."""
    step = PPO.step

    def measuring(self: PPO, *arguments: Any, **options: Any) -> Any:
        found = step(self, *arguments, **options)
        if found.number % EVERY == 0:
            gc.collect()
            report("at " + " ".join(str(x) for x in _measured(found.number)))
        return found

    PPO.step = measuring  # type: ignore[method-assign]


def _measured(step: int) -> Measured:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Measured(
        step,
        pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
        sum(type(found).__name__ != OF_RICH for found in gc.get_objects()),
    )


def _read(line: str) -> Measured:
    step, megabytes, *counts = line.split()[1:]
    return Measured(int(step), float(megabytes), *map(int, counts))


def _words(found: Measured) -> str:
    return (
        f"step {found.step}: {found.megabytes:.1f} MB, {found.descriptors} descriptors, "
        f"{found.threads} threads, {found.objects} objects"
    )
