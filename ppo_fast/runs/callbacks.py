"""Callback: the base of objects that watch a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_fast.data.evaluated import Evaluated
from ppo_fast.data.step import Step
from ppo_fast.user_code import lacking, parameters

logger = logging.getLogger(__name__)

OnStep = Callable[[Step], None]


class Callback:
    """Watches a run. Override the methods that you need; each does nothing by itself.

    An error in one ends the run, after a checkpoint.
    """

    def on_start(self, settings: Mapping[str, Any], steps: int) -> None:
        """Be told the settings of the run, and how many steps are done already."""

    def on_step(self, step: Step) -> None:
        """Be given each step."""

    def on_evaluate(self, evaluated: Evaluated) -> None:
        """Be given each evaluation."""

    def on_save(self, step: int, path: Path) -> None:
        """Be told that the checkpoint of a step was written."""

    def on_end(self, result: Mapping[str, Any] | None) -> None:
        """Be given what ``train`` returns, at the end; None: it ends with an error."""


class Callbacks(Callback):
    """Calls several callbacks, in their order.

    Args:
        callbacks: ``train``'s.
        on_step: ``train``'s; called last.

    Attributes:
        all: the callbacks.

    Raises:
        TypeError: one is no Callback, or on_step is no function of a Step.
    """

    def __init__(self, callbacks: Sequence[Callback] | None, on_step: OnStep | None = None) -> None:
        callbacks = [callbacks] if isinstance(callbacks, Callback) else callbacks or []
        for one in callbacks:
            if not isinstance(one, Callback):
                raise TypeError(
                    f"callbacks: got {type(one).__name__}, expected objects of classes that "
                    "derive from ppo_fast.Callback"
                )
        if on_step is not None and not (callable(on_step) and _takes_one(on_step)):
            raise TypeError(f"on_step: got {on_step!r}, expected a function of a Step, or None")
        self.all, self._on_step = list(callbacks), on_step

    def on_start(self, settings: Mapping[str, Any], steps: int) -> None:
        for one in self.all:
            one.on_start(settings, steps)

    def on_step(self, step: Step) -> None:
        for one in self.all:
            one.on_step(step)
        if self._on_step is not None:
            self._on_step(step)

    def on_evaluate(self, evaluated: Evaluated) -> None:
        for one in self.all:
            one.on_evaluate(evaluated)

    def on_save(self, step: int, path: Path) -> None:
        for one in self.all:
            one.on_save(step, path)

    def on_end(self, result: Mapping[str, Any] | None) -> None:
        """Tell all of the end; then raise the first error, unless the run ends with another."""
        first: Exception | None = None
        for one in self.all:
            try:
                one.on_end(result)
            except Exception as error:
                logger.warning("callbacks: %s failed at the end: %s", type(one).__name__, error)
                first = first or error
        if first is not None and result is not None:
            raise first


def _takes_one(function: OnStep) -> bool:
    """Return whether a function can be called with one argument."""
    found = parameters(function)
    return (found.args or bool(found.positional)) and not lacking(function, 1, ())
