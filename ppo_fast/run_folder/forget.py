"""Drop lines of a run's files that a resumed run writes again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

from ppo_fast.disk.files import written


def step_of(line: bytes) -> float:
    """Return the step of a line; infinity for one that a killed run left half written."""
    try:
        step = json.loads(line.decode("utf-8", errors="replace"))["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, (int, float)) else math.inf


def keep_lines(path: Path, keep: Callable[[bytes], bool]) -> None:
    """Drop the lines of a file for which ``keep`` is false, if there is such a file.

    Where all of them are its last ones, the file is cut, which needs no space on the disk. Else a
    new file takes its place.
    """
    if not path.exists():
        return
    end, kept_after_it, size = _first_dropped(path, keep)
    if end == size:
        return
    if not kept_after_it:
        with path.open("r+b") as file:
            file.truncate(end)
            os.fsync(file.fileno())
        return
    with path.open("rb") as old, written(path) as new:
        for line in old:
            if keep(line):
                new.write(line.removesuffix(b"\n") + b"\n")


def _first_dropped(path: Path, keep: Callable[[bytes], bool]) -> tuple[int, bool, int]:
    """Return where the first line to drop begins, if a kept one follows it, and the file's size.

    A kept line without a line break counts as one that follows.
    """
    end, size, dropped, follows = 0, 0, False, False
    with path.open("rb") as file:
        for line in file:
            size += len(line)
            if not keep(line):
                dropped = True
            elif dropped or not line.endswith(b"\n"):
                follows = True
            else:
                end = size
    return end, follows, size
