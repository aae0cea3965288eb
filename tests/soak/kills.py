"""Kill tiny runs at random moments, resume them, and compare their ends with an unkilled run's."""

from __future__ import annotations

import random
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

from ppo_fast.checkpointing.kept import checkpoints_in
from soak.file_faults import Action, FileFaults
from soak.kept_whole import differences, lost
from soak.part import Found, work_folder
from soak.tiny_runs import VARIANTS, TinyRun, place
from soak.worker import Ended

STEPS = 5
# Steps to which a run goes, with exports after each.
GOALS = ((STEPS,), (2, STEPS), (3, STEPS))
# How a run is ended; the last three at a file operation.
WAYS = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "before", "after", "half")
AT_OPERATIONS = {"before": Action.KILL, "after": Action.KILL_AFTER, "half": Action.KILL_HALF}
# Of a stopped run, by the signal: after its step, or before the run handles signals.
STATUSES = {"SIGTERM": (143, -signal.SIGTERM), "SIGINT": (130, -signal.SIGINT)}


class Kills:
    """Part of the soak; the count that has a target is that of SIGKILLs that hit a run."""

    target, counted = 1000, "kills"

    def __init__(self) -> None:
        self._folder = work_folder("kills")
        self._place = place()
        self._faults = FileFaults()
        self._references: dict[Path, tuple[float, int]] = {}

    def close(self) -> None:
        """Remove the folders of runs that lost nothing."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def again(self, seed: int) -> Found:
        """Run a case again."""
        return self.case(seed)

    def case(self, seed: int) -> Found:
        """Run one run to its end, with kills between."""
        draw = random.Random(f"kills {seed}")
        variant, goals = draw.choice([*VARIANTS]), draw.choice(GOALS)
        reference = self._folder / "-".join(["reference", variant, *map(str, goals)])
        seconds, operations = self._reference(reference, variant, goals)
        run = self._run(variant, f"{variant}-{seed}")
        counts, failures, saved = Counter(runs=1), [], 0
        for goal in goals:
            left = draw.randint(1, 4)
            while True:
                exported = (run.folder / "policy").exists()
                way = draw.choice(WAYS) if left else None
                ended = self._end(run, goal, way, draw.uniform(0, seconds), draw, operations)
                saved = max([saved, *ended.numbers("saved")])
                counts += _counted(way, ended)
                wrong = [*_of_status(way, ended), *lost(run.folder, saved, exported=exported)]
                # a checkpoint may be written and its process killed before it reported it
                saved = max([saved, *checkpoints_in(run.folder / "checkpoints")])
                if ended.status in (130, 143):
                    wrong += _lost_steps(ended, saved)
                failures += [f"{variant}, {way}, goal {goal}: {x}" for x in wrong]
                left -= 1
                if ended.status == 0 or failures:
                    break
                left = max(left, 0)
            if failures:
                break
        if not failures:
            failures = [*differences(run.folder, reference, STEPS)]
        if failures and run.output.exists():
            print(f"kills, case {seed}: {run.output.read_text()[-3000:]}", file=sys.stderr)
        shutil.rmtree(run.folder, ignore_errors=True)
        run.output.unlink(missing_ok=True)
        return Found(counts, failures)

    def _run(self, variant: str, name: str) -> TinyRun:
        return TinyRun(variant, self._place, self._folder / name, self._folder / f"{name}.out")

    def _reference(self, folder: Path, variant: str, goals: tuple[int, ...]) -> tuple[float, int]:
        """Run without a kill, once; return the seconds and file operations of its longest part."""
        if folder not in self._references:
            run, found = self._run(variant, folder.name), []
            for goal in goals:
                self._faults.plan()
                ended = run.start(goal, self._faults).wait()
                if ended.status:
                    raise RuntimeError(f"status {ended.status}: {run.output.read_text()}")
                found.append((ended.seconds, self._faults.count))
            if wrong := [*lost(folder, STEPS, exported=True)]:
                raise RuntimeError(f"without a kill: {wrong}")
            self._references[folder] = max(found)
        return self._references[folder]

    def _end(
        self,
        run: TinyRun,
        goal: int,
        way: str | None,
        moment: float,
        draw: random.Random,
        operations: int,
    ) -> Ended:
        """Run to ``goal`` steps, or to where it is ended."""
        action = AT_OPERATIONS.get(way or "", Action.COUNT)
        self._faults.plan(action, draw.randint(1, operations))
        worker = run.start(goal, self._faults)
        if way is None or way in AT_OPERATIONS:
            return worker.wait()
        worker.send_after(moment, getattr(signal, way))
        return worker.wait()


def _counted(way: str | None, ended: Ended) -> Counter[str]:
    if ended.status == 0:
        return Counter()
    if way in STATUSES:
        return Counter({way: 1})
    return Counter(kills=1, kills_in_file_operations=int(way in AT_OPERATIONS))


def _of_status(way: str | None, ended: Ended) -> list[str]:
    """Return what is wrong with how a run ended."""
    expected = STATUSES.get(way or "", (-signal.SIGKILL,)) if way else ()
    if ended.hung:
        return ["it hung"]
    if ended.status not in (0, *expected):
        return [f"it ended with status {ended.status}"]
    return []


def _lost_steps(ended: Ended, saved: int) -> list[str]:
    """Return the steps that a run did and did not save, which was stopped by a signal and ended by
    itself."""
    done = max(ended.numbers("done"), default=0)
    return [f"step {done} was done, and step {saved} saved"] if done > saved else []
