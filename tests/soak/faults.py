"""Let each file operation of a save, a resume and an export fail: by error, full disk or kill."""

from __future__ import annotations

import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_trainer import PROMPTS, tiny_trainer

from ppo_fast.checkpointing.checkpoint import checkpoint_path, load
from ppo_fast.checkpointing.kept import checkpoints_in, remove_old
from ppo_fast.disk.files import HALF, remove_partial
from ppo_fast.exports.export import export_policy, load_critic, save_critic
from ppo_fast.exports.model_card import ModelCard
from soak.file_faults import Action, FileFaults
from soak.kept_whole import damage_of_export, differences, lost
from soak.part import Found, work_folder
from soak.tiny_runs import TinyRun, place
from soak.worker import Ended, Report, Worker

ACTIONS = (Action.FAIL, Action.FULL, Action.KILL, Action.KILL_HALF)
ALREADY, STEPS = 2, 3  # steps of the run that is resumed, and of its end
WEIGHTS = "model.safetensors"


class Faults:
    """Part of the soak: a case is an operation of a save, a resume or an export, and its fault."""

    counted = "cases"

    def __init__(self) -> None:
        self._folder = work_folder("faults")
        self._place = place()
        self._plan = FileFaults()
        self._output = self._folder / "output"
        for name, steps in (("before", ALREADY), ("reference", STEPS)):
            if (ended := self._run(name).start(steps).wait()).status:
                raise RuntimeError(f"status {ended.status}: {self._said()}")
        self._cases = [
            (what, action, number)
            for what in ("save", "export", "resume")
            for number, kind in enumerate(self._kinds(what), start=1)
            for action in ACTIONS
            if action != Action.KILL_HALF or kind == "write"
        ]
        random.Random(0).shuffle(self._cases)

    @property
    def target(self) -> int:
        """Number of cases."""
        return len(self._cases)

    def close(self) -> None:
        """Remove the folders."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def again(self, seed: int) -> Found:
        """Run a case again."""
        return self.case(seed)

    def case(self, seed: int) -> Found:
        """Let one operation fail, and look at what is left and what the next try does."""
        what, action, number = self._cases[seed % len(self._cases)]
        self._output.unlink(missing_ok=True)
        self._plan.plan(action, number)
        folder = self._prepared(what)
        first = self._try(what, folder)
        happened = self._plan.happened
        failures = [*_of_end(first, self._said(), action if happened else None)]
        failures += self._left(what, folder, first)
        self._plan.plan()
        again = self._try(what, folder, again=True)
        if again.status:
            failures.append(f"the next try ended with {again.status}: {self._said()[-300:]}")
        else:
            failures += self._end(what, folder)
        if failures:
            print(f"faults, case {seed}: {self._said()[-3000:]}", file=sys.stderr)
        shutil.rmtree(folder)
        at = f"{what}, operation {number} ({self._kinds_of[what][number - 1]}), {action.name}"
        counts = {"cases": 1, what: 1, action.name: 1, "happened": int(happened)}
        return Found(Counter(counts), [f"{at}: {x}" for x in failures])

    def _kinds(self, what: str) -> list[str]:
        """Return the kinds of the file operations of a save, a resume or an export."""
        self._plan.plan()
        folder = self._prepared(what)
        if (ended := self._try(what, folder)).status:
            raise RuntimeError(f"{what}: status {ended.status}: {self._said()}")
        shutil.rmtree(folder)
        found = [self._plan.kind_of(i + 1) for i in range(self._plan.count)]
        self._kinds_of = getattr(self, "_kinds_of", {}) | {what: found}
        return found

    def _prepared(self, what: str) -> Path:
        folder = self._folder / what
        if what == "resume":
            shutil.copytree(self._folder / "before", folder)
        else:
            folder.mkdir()
        return folder

    def _run(self, name: str) -> TinyRun:
        return TinyRun("head", self._place, self._folder / name, self._folder / "output")

    def _try(self, what: str, folder: Path, *, again: bool = False) -> Ended:
        if what == "resume":
            return self._run(what).start(STEPS, self._plan).wait()
        doing = save_twice if what == "save" else export_twice
        return Worker(lambda report: doing(folder, self._plan, report, again), self._output).wait()

    def _said(self) -> str:
        return self._output.read_text("utf-8", errors="replace") if self._output.exists() else ""

    def _left(self, what: str, folder: Path, ended: Ended) -> Iterator[str]:
        """Yield what is lost after the fault."""
        saved = max(ended.numbers("saved"), default=0)
        if what == "resume":
            yield from lost(folder, max(saved, ALREADY), exported=True)
        elif what == "save":
            found = checkpoints_in(folder)
            if max(found, default=0) < saved:
                yield f"checkpoint {saved} is gone"
            for path in found.values():
                try:
                    load(path)
                except ValueError as error:
                    yield f"{error}"
        else:
            for name in ("policy", "critic"):
                if not (folder / name).exists():
                    yield f"{name}/ is gone"
                else:
                    yield from damage_of_export(folder / name)

    def _end(self, what: str, folder: Path) -> Iterator[str]:
        """Yield what is wrong after the next try, which succeeded."""
        if what == "resume":
            yield from differences(folder, self._folder / "reference", STEPS)
        elif left := [*folder.rglob(f"{HALF}*")]:
            yield f"left half written: {[path.name for path in left]}"


def _of_end(ended: Ended, said: str, action: Action | None) -> Iterator[str]:
    """Yield what is wrong with how a process ended."""
    if ended.hung:
        yield "it hung"
    killed = action in (Action.KILL, Action.KILL_HALF)
    if killed and ended.status != -signal.SIGKILL:
        yield f"it was not killed but ended with {ended.status}"
    if not killed and ended.status not in (0, 2):
        yield f"it ended with {ended.status}: {said[-300:]}"
    if ended.status == 2 and ("Traceback" in said or "ppo-fast: " not in said):
        yield f"it has no clear error: {said[-300:]}"


def save_twice(folder: Path, plan: FileFaults, report: Report, again: bool) -> int | None:
    """Save a checkpoint after one step, and another, watched, after the next; keep one."""
    remove_partial(folder)  # as a run does when it begins
    trainer = tiny_trainer(critic="head", layers=1)
    for step in (1, 2):
        trainer.train_step(PROMPTS[:2])
        if step == 2:
            plan.watch(folder)

        def save(step: int = step) -> None:
            trainer.save_checkpoint(folder, step)
            report(f"saved {step}")
            remove_old(folder, step, 1)

        if (status := _said_in_a_line(save)) is not None:
            return status
    plan.unwatch()
    trainer.load_checkpoint(checkpoint_path(folder, 2))
    return 0


def export_twice(folder: Path, plan: FileFaults, report: Report, again: bool) -> int | None:
    """Export policy and critic, and after a step once more, watched."""
    remove_partial(folder)
    trainer = tiny_trainer(critic="head", layers=1)
    for step in (2,) if again else (1, 2):
        trainer.train_step(PROMPTS[:2])
        if step == 2:
            plan.watch(folder)

        def export() -> None:
            card = ModelCard("tiny", "policy", curve=[(1, 0.5), (2, 1.0)])
            export_policy(trainer.policy.model, trainer.tokenizer, folder / "policy", card=card)
            save_critic(trainer, folder / "critic", card=card)

        if (status := _said_in_a_line(export)) is not None:
            return status
    plan.unwatch()
    load_critic(trainer.critic.module, folder / "critic")
    saved = load_file(folder / "policy" / WEIGHTS)
    own: dict[str, Any] = trainer.policy.model.state_dict()
    return 0 if all(torch.equal(own[name], saved[name]) for name in saved) else 98


def _said_in_a_line(doing: Callable[[], None]) -> int | None:
    """Run it; print the errors that are allowed, in a line, as the command does, and return 2."""
    try:
        doing()
    except (OSError, ValueError) as error:
        if len(f"{error}".splitlines()) != 1:
            raise
        print(f"ppo-fast: {error}")
        return 2
    return None
