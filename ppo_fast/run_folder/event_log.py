"""EventLog: warnings of a run become lines of events.jsonl."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

LOGGER = "ppo_fast"


class EventLog(logging.Handler):
    """Gives warnings and errors that ``ppo_fast`` logs to a function, as lines of events.jsonl.

    Without any handler, Python prints warnings on stderr. This handler ends that, so where there is
    no other, it prints them itself.

    Args:
        write: takes {"time", "level", "source", "text"}.
    """

    def __init__(self, write: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(logging.WARNING)
        self._write = write

    def start(self) -> None:
        """Begin to listen."""
        logging.getLogger(LOGGER).addHandler(self)

    def stop(self) -> None:
        """Listen no more. A second call does nothing."""
        logging.getLogger(LOGGER).removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            line = {
                "time": record.created,
                "level": record.levelname,
                "source": record.name,
                "text": record.getMessage(),
            }
            self._write(line)
        except (
            Exception
        ):  # as in logging's own handlers: a warning that cannot be written ends no run
            self.handleError(record)
        if self._prints(record) and logging.lastResort is not None:
            logging.lastResort.handle(record)

    def _prints(self, record: logging.LogRecord) -> bool:
        """Return whether this is the first of all handlers that get a record, and all are ours."""
        found: list[logging.Handler] = []
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            found += logger.handlers
            logger = logger.parent if logger.propagate else None
        return found[:1] == [self] and all(isinstance(one, EventLog) for one in found)
