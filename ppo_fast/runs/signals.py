"""Let signals end a run after its current step, or have it write a checkpoint."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

# Ctrl-C, and what queues (SLURM, Kubernetes) send before they kill a job.
STOP = (signal.SIGINT, signal.SIGTERM)
# Missing on Windows.
SAVE: Any = getattr(signal, "SIGUSR1", None)


class StoppedAtOnce(KeyboardInterrupt):
    """Raised where a second signal to stop comes before the step is done.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Received:
    """Signals received so far.

    Attributes:
        stop: the first signal to stop; None: none came.
    """

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        self._save = False

    def take_save(self) -> bool:
        """Return whether a checkpoint was asked for since the last call."""
        asked, self._save = self._save, False
        return asked

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal.

        Raises:
            StoppedAtOnce: it is the second one to stop.
        """
        if number == SAVE:
            self._save = True
            return
        if self.stop is not None:
            raise StoppedAtOnce(number)
        self.stop = signal.Signals(number)
        logger.warning(
            "%s: finishing this step; a second one stops at once and loses the step",
            "Ctrl-C" if number == signal.SIGINT else self.stop.name,
        )


@contextmanager
def handled_signals() -> Iterator[Received]:
    """Within the block, note SIGINT, SIGTERM and SIGUSR1 instead of ending the process.

    Outside the main thread, where Python allows no signal handlers, nothing changes.
    """
    received = Received()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = [*STOP, *([SAVE] if SAVE is not None else [])]
    before = {number: signal.signal(number, received.note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            # None: the handler was not set from Python
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
