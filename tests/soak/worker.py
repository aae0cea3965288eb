"""Processes forked after the imports: what they report arrives even when they are killed."""

from __future__ import annotations

import faulthandler
import math
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

Report = Callable[[str], None]


class Ended(NamedTuple):
    """A process that ended: its exit status, or minus the signal that ended it, what it reported,
    whether it was ended by us for taking too long, and the seconds that it took."""

    status: int
    reports: list[str]
    hung: bool
    seconds: float

    def numbers(self, word: str) -> list[int]:
        """Return the numbers of the reports "word number"."""
        found = (line.split() for line in self.reports)
        return [int(parts[1]) for parts in found if parts[0] == word]


class Worker:
    """A forked process that runs ``task``, with its output in a file.

    Args:
        task: what it runs; it is given a function that reports a line. Its result is the status.
        output: file for what it prints, and for the traceback of an error, which is status 99.
    """

    def __init__(self, task: Callable[[Report], int | None], output: Path) -> None:
        reader, writer = os.pipe()
        self._started = time.monotonic()
        self._process = os.fork()
        if self._process == 0:
            os.close(reader)
            _run(task, output, writer)
        os.close(writer)
        self._reader, self._received = reader, b""

    def wait(self, seconds: float = 120.0) -> Ended:
        """Wait for its end, for so long at most."""
        hung = self._runs_until(self._started + seconds)
        if hung:
            os.kill(self._process, signal.SIGUSR2)  # its stack goes to its output
            self._runs_until(time.monotonic() + 1.0)
            os.kill(self._process, signal.SIGKILL)
            self._runs_until(math.inf)
        os.close(self._reader)
        status = os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])
        lines = self._received.decode().splitlines()
        return Ended(status, lines, hung, time.monotonic() - self._started)

    def send_after(self, seconds: float, number: int) -> None:
        """Send a signal so long after its start, unless it has ended."""
        if self._runs_until(self._started + seconds):
            os.kill(self._process, number)

    def _runs_until(self, moment: float) -> bool:
        """Read what it reports; return whether it still runs at ``moment``."""
        while (left := moment - time.monotonic()) > 0:
            timeout = None if left == math.inf else left
            if not select.select([self._reader], [], [], timeout)[0]:
                break
            if not (received := os.read(self._reader, 65536)):
                return False  # it alone had the other end
            self._received += received
        return True


def _run(task: Callable[[Report], int | None], output: Path, writer: int) -> None:
    """Run the task in the forked process, and end it."""
    status: int | None = 99
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        faulthandler.register(signal.SIGUSR2, all_threads=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)
        status = task(partial(_write_line, writer))
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException as error:
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):  # as Python itself ends
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        os._exit(status or 0)


def _write_line(writer: int, line: str) -> None:
    os.write(writer, f"{line}\n".encode())


def import_all_of(task: Callable[[Report], int | None], output: Path) -> None:
    """Import the modules that ``task`` imports, which runs once in a process of its own."""

    def run(report: Report) -> None:
        task(report)
        report("modules " + " ".join(sys.modules))

    ended = Worker(run, output).wait()
    if ended.status:
        raise RuntimeError(f"status {ended.status}: {output.read_text()}")
    (line,) = (line for line in ended.reports if line.startswith("modules "))
    for name in line.split()[1:]:
        if name not in sys.modules:
            try:
                import_module(name)
            except (ImportError, AttributeError):  # modules made while they run
                continue
