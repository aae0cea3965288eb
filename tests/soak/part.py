"""Parts of the soak: what they find, and how far they are, in a file of JSON."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ppo_fast.disk.files import written


def work_folder(name: str) -> Path:
    """Make a new folder for a part, in memory if possible: a disk's fsync would take most of the
    time, and what a killed process has written is as safe there."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix=f"soak-{name}-", dir=memory if memory.is_dir() else None))


class Found(NamedTuple):
    """Counts of a case, and what was wrong in it."""

    counts: Counter[str]
    failures: list[str]


class Part(Protocol):
    """A part: cases by number, each the same in every run.

    counted: name of the count that has the target.
    """

    counted: str

    @property
    def target(self) -> int: ...

    def case(self, seed: int) -> Found: ...

    def again(self, seed: int) -> Found:
        """Run the case of a failure again."""
        ...

    def close(self) -> None: ...


class State:
    """How far a part is.

    Args:
        path: of the file; it is read where it exists, and written by ``save``.

    Attributes:
        next: number of the next case.
        seconds: that the cases took.
        counts: of all cases so far.
        counted, target: name of the count that has a target, and the target.
        failures: of them, each with its number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = json.loads(path.read_text("utf-8")) if path.exists() else {}
        self.next: int = found.get("next", 0)
        self.seconds: float = found.get("seconds", 0.0)
        self.counts: Counter[str] = Counter(found.get("counts", {}))
        self.counted: str = found.get("counted", "")
        self.target: int = found.get("target", 0)
        self.failures: list[dict[str, Any]] = found.get("failures", [])

    def save(self) -> None:
        """Write the file, whole or not at all."""
        names = ("next", "seconds", "counts", "counted", "target", "failures")
        text = json.dumps({name: getattr(self, name) for name in names}, indent=1)
        with written(self.path) as file:
            file.write(text.encode())

    def try_again(self, part: Part) -> None:
        """Run the cases that failed again, since the code may have been mended: what is wrong now
        stays."""
        for number in sorted({failure["case"] for failure in self.failures}):
            found = part.case(number)
            self.failures = [f for f in self.failures if f["case"] != number]
            self.failures += [{"case": number, "what": what} for what in found.failures]
            self.save()

    def run(self, part: Part, seconds: float, cases: int | None = None) -> bool:
        """Run cases for so long, or so many, or to the part's target; return if it is reached."""
        self.counted, self.target = part.counted, part.target
        ends = time.monotonic() + seconds
        last = None if cases is None else self.next + cases
        while self.counts[part.counted] < part.target and self.next != last:
            started = time.monotonic()
            if started >= ends:
                break
            found = part.case(self.next)
            self.counts += found.counts
            self.failures += [{"case": self.next, "what": what} for what in found.failures]
            self.next += 1
            self.seconds += time.monotonic() - started
            self.save()
        return self.counts[part.counted] >= part.target
