"""A started tracker, whose failures do not end the run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from ppo_fast.trackers.classes import Startable
from ppo_fast.trackers.kinds import Table, TrackedRun

logger = logging.getLogger(__name__)

MOST_FAILURES = 3  # in a row


class RunningTracker:
    """A started tracker; its failures, after the start, are logged and not raised.

    Args:
        name: of the tracker.
        startable: the tracker.
        run: the run.
        known: what ``state`` returned in the process before; empty: a new run.

    Raises:
        RuntimeError: it does not start.
    """

    def __init__(
        self, name: str, startable: Startable, run: TrackedRun, known: Mapping[str, Any]
    ) -> None:
        self.name, self._failures, self._said = name, 0, False
        self.kind, self._resumed = startable.kind, run.identity is not None
        self._before = {what: known.get(what, -1) for what in ("step", "evaluation")}
        if self.kind.rewrites:
            self._before = {what: min(n, run.steps) for what, n in self._before.items()}
        elif self._before["step"] > run.steps:
            logger.warning(
                "%s has the steps up to %d already, and gets those after them alone",
                name,
                self._before["step"],
            )
        self._logged = dict(self._before)
        try:
            self._tracker: Any = startable.make(self.kind.arguments(run), run)
            self._identity = self.kind.identity(self._tracker)
        except Exception as error:  # of any type: it is the tracker's
            raise RuntimeError(f"report_to: {name} does not start: {error}") from error

    def store(self, settings: dict[str, bool | int | float | str]) -> None:
        """Store the run's settings, unless they are and cannot be changed."""
        if not (self._resumed and self.kind.settings_once):
            self._attempt(lambda t: t.store_init_configuration(settings))

    def log(
        self, what: str, step: int, metrics: Mapping[str, float], name: str, table: Table | None
    ) -> None:
        """Log numbers, those that are finite, and a table, unless a process before this one did.

        Args:
            what: "step" or "evaluation".
            step: its number.
            metrics: the numbers.
            name, table: of the table; None: there is none.
        """
        if step <= self._before[what]:
            return
        if self._failures >= MOST_FAILURES:
            return
        if self._attempt(lambda t: t.log(self.kind.named(metrics), step=step)):
            self._failures, self._logged[what] = 0, step
        else:
            self._failures += 1
        show = self.kind.table
        if table is not None and show is not None:
            self._attempt(lambda t: show(t, name, table, step))
        if self._failures == MOST_FAILURES:
            logger.warning(
                "report_to: %s failed %d times in a row; it gets no more until the run is resumed",
                self.name,
                MOST_FAILURES,
            )

    def finish(self, failed: bool) -> None:
        """Finish the tracker."""
        self._attempt(self.kind.fail if failed and self.kind.fail else lambda t: t.finish())

    def _attempt(self, call: Callable[[Any], Any]) -> bool:
        """Call a method of the tracker; return whether it did not fail. The first failure warns."""
        try:
            call(self._tracker)
        except Exception as error:  # of any type: no tracker ends a run
            if not self._said:
                self._said = True
                kind = type(error).__name__
                logger.warning(
                    "report_to: %s failed, and the run goes on (%s: %s)", self.name, kind, error
                )
            return False
        return True

    def state(self) -> dict[str, Any]:
        """Return what the next process needs to go on."""
        return {"identity": self._identity, **self._logged}


def as_settings(settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Return settings as every tracker takes them: all but numbers and booleans as texts."""

    def plain(value: Any) -> bool | int | float | str:
        if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
            return value
        return str(value)

    return {str(name): plain(value) for name, value in settings.items()}
