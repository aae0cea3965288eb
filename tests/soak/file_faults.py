"""Count the file operations under a folder, and let one fail or end the process: file_faults.c.

Linux alone has LD_PRELOAD in this form; it must be set when the process starts.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections import Counter
from enum import IntEnum
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
KINDS = ("open", "read", "write", "sync", "rename", "mkdir", "remove", "stat", "list", "chmod")
NOTED = 65536


class Action(IntEnum):
    """What happens at an operation: nothing; it fails once (EIO); the disk is full from there on;
    the process is killed before it, after it, or when half of its bytes are written."""

    COUNT = 0
    FAIL = 1
    FULL = 2
    KILL = 3
    KILL_AFTER = 4
    KILL_HALF = 5


class _Plan(ctypes.Structure):
    _fields_ = (
        ("action", ctypes.c_long),
        ("at", ctypes.c_long),
        ("count", ctypes.c_long),
        ("happened", ctypes.c_long),
        ("kinds", ctypes.c_ubyte * NOTED),
    )


class FileFaults:
    """Plan of what happens to file operations; forked processes share it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, ctypes.sizeof(_Plan))
        self._plan = _Plan.from_buffer(self._memory)
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])

    def plan(self, action: Action = Action.COUNT, at: int = 0) -> None:
        """Let this happen at the operation of number ``at``, counted from now on."""
        self._plan.action, self._plan.at = int(action), at
        self._plan.count = self._plan.happened = 0

    def watch(self, folder: Path) -> None:
        """Begin to count in this process, for paths that begin with that of ``folder``."""
        self._library.soak_watch(ctypes.byref(self._plan), os.fsencode(folder))

    def unwatch(self) -> None:
        """Let all operations of this process be what they are."""
        self._library.soak_watch(None, b"")

    @property
    def count(self) -> int:
        """Number of operations so far."""
        return self._plan.count

    @property
    def happened(self) -> bool:
        """Whether the plan's fault happened."""
        return self._plan.happened > 0

    @property
    def kinds(self) -> Counter[str]:
        """Numbers of operations by kind."""
        return Counter(KINDS[kind] for kind in self._plan.kinds[: min(self.count, NOTED)])

    def kind_of(self, number: int) -> str:
        """Return the kind of an operation, counted from 1."""
        return KINDS[self._plan.kinds[number - 1]]


def build(folder: Path) -> Path:
    """Compile the library into ``folder``, if its source is newer; return its path."""
    library = folder / "file_faults.so"
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        folder.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CC", "cc")
        flags = ["-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"]
        subprocess.run([compiler, *flags], check=True)
    return library


def start_again_with(library: Path) -> None:
    """Replace this process by itself with the library loaded, unless it is."""
    if os.environ.get("LD_PRELOAD") != str(library):
        os.environ["LD_PRELOAD"] = str(library)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
