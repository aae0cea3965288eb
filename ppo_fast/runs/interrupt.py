"""Let Ctrl-C finish the current step."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


@contextmanager
def finish_step_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Within the block, only note the first Ctrl-C; the second raises KeyboardInterrupt at once.

    Yields a function that returns whether Ctrl-C was noted. Outside the main thread, where Python
    allows no signal handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    count = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt
        logger.warning(
            "Ctrl-C: finishing this step; press it again to stop at once and lose the step"
        )

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: count > 0
    finally:
        # None: the handler was not set from Python
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
