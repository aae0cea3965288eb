"""Control: changes that a user asks of a run while it goes on, through a small file."""

from __future__ import annotations

import difflib
import logging
import time
from pathlib import Path
from typing import Any

import yaml

from ppo_fast.checks import is_number
from ppo_fast.learning.learner import Learner

logger = logging.getLogger(__name__)

RATES = {"learning_rate": "policy", "value_learning_rate": "value"}
KEYS = (*RATES, "kl_penalty", "checkpoint")
SETTLED = 0.5  # seconds after which a file that was changed is read: it may be written in parts


class Control:
    """Reads a YAML file after each step, and does what it asks.

    The file has some of: ``learning_rate``, ``value_learning_rate`` (under a schedule, the highest
    rate: the whole course is scaled), ``kl_penalty`` (likewise), ``checkpoint: true``. It is
    removed when the changes are in a checkpoint.

    Args:
        path: of the file; None: nothing is read.
        learner: whose numbers are changed.
    """

    def __init__(self, path: Path | None, learner: Learner) -> None:
        self._path, self._learner = path, learner
        self._refused: str | None = None
        self._applied: str | None = None

    def apply(self, steps: int) -> bool:
        """Read the file and apply it; return whether a checkpoint is to be written.

        A file that cannot be read as meant changes nothing; a warning says why, once.

        Args:
            steps: steps done.
        """
        text = self._read()
        if text is None or text in (self._refused, self._applied):
            return text is not None and text == self._applied
        try:
            changes = checked_changes(text, self._learner)
            lines = [self._apply_one(name, value, steps) for name, value in changes.items()]
        except ValueError as error:
            self._refused = text
            logger.warning("%s: %s; nothing was changed", self._path, error)
            return False
        self._applied = text
        for line in lines:
            if line:
                logger.warning("%s: from step %d on, %s", self._path, steps + 1, line)
        return True

    def forget(self) -> None:
        """Remove the file, unless it was changed since it was applied."""
        if self._applied is None or self._path is None:
            return
        if self._read() == self._applied:
            self._path.unlink(missing_ok=True)
        self._applied = None

    def _read(self) -> str | None:
        if self._path is None:
            return None
        try:
            if 0 <= time.time() - self._path.stat().st_mtime < SETTLED:
                return None
            return self._path.read_text("utf-8", errors="replace")
        except OSError:
            return None

    def _apply_one(self, name: str, value: Any, steps: int) -> str:
        """Apply a change, and return what is said of it."""
        if name == "checkpoint":
            return ""
        if name == "kl_penalty":
            before = self._learner.kl_coefficient(steps)
            self._learner.set_kl_coefficient(float(value), steps)
        else:
            before = self._learner.set_rate(RATES[name], float(value))
        return f"{name} is {float(value):g} instead of {before:g}"


def checked_changes(text: str, learner: Learner) -> dict[str, Any]:
    """Return the changes that a control file asks for.

    Raises:
        ValueError: it is no mapping of known names to numbers in their ranges.
    """
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"no YAML ({' '.join(str(error).split())})") from error
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise ValueError(f"got {found!r}, expected lines such as learning_rate: 1.0e-6")
    for name, given in found.items():
        value = found[name] = _number(given)
        if name not in KEYS:
            near = difflib.get_close_matches(str(name), KEYS, 1)
            hint = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(KEYS)}"
            raise ValueError(f"got {name!r}; {hint}")
        if name == "checkpoint":
            if not isinstance(value, bool):
                raise ValueError(f"checkpoint: got {value!r}, expected true or false")
        elif not is_number(value) or not (0 < value <= 1 if name in RATES else 0 <= value < 1e6):
            expected = "above 0, at most 1" if name in RATES else "at least 0"
            raise ValueError(f"{name}: got {value!r}, expected a number {expected}")
        elif name in RATES and RATES[name] not in learner.optimizers:
            raise ValueError(f"{name}: the trainer has no value function")
    return found


def _number(value: Any) -> Any:
    """Return a number that YAML takes for a text, such as 1e-6; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
