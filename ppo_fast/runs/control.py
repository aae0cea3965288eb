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

    Raises:
        TypeError: the path is none.
    """

    def __init__(self, path: str | Path | None, learner: Learner) -> None:
        if path is not None and not isinstance(path, (str, Path)):
            raise TypeError(f"control: got {path!r}, expected the path of a file, or None")
        self._path, self._learner = None if path is None else Path(path), learner
        self._refused: str | None = None
        self._applied: str | None = None

    def apply(self, steps: int) -> bool:
        """Read the file and apply it; return whether a checkpoint is to be written.

        A file that cannot be read as meant changes nothing; a warning says why, once.

        Args:
            steps: steps done.
        """
        text = self._read()
        if text is None or not text.strip() or text == self._refused:
            return False
        if text == self._applied:
            return True
        try:
            changes = checked_changes(text, self._learner, steps)
        except (ValueError, RecursionError) as error:
            self._refused = text
            logger.warning("%s: %s; nothing was changed", self._path, error)
            return False
        asked = changes.pop("checkpoint", False) or bool(changes)
        for name, value in changes.items():
            before = self._apply_one(name, float(value), steps)
            logger.warning(
                "%s: from step %d on, %s is %g instead of %g",
                self._path,
                steps + 1,
                name,
                value,
                before,
            )
        self._applied = text
        return asked

    def forget(self) -> None:
        """Remove the file, unless it was changed since it was applied."""
        if self._applied is None or self._path is None or self._read() != self._applied:
            return
        try:
            self._path.unlink(missing_ok=True)
            self._applied = None
        except OSError as error:
            self._refused, self._applied = self._applied, None
            logger.warning("%s was applied and cannot be removed (%s)", self._path, error)

    def _read(self) -> str | None:
        if self._path is None:
            return None
        try:
            if 0 <= time.time() - self._path.stat().st_mtime < SETTLED:
                return None
            return self._path.read_text("utf-8", errors="replace")
        except OSError:
            return None

    def _apply_one(self, name: str, value: float, steps: int) -> float:
        """Apply a change, and return the number before."""
        if name in RATES:
            return self._learner.set_rate(RATES[name], value)
        before = self._learner.kl_coefficient(steps)
        self._learner.set_kl_coefficient(value, steps)
        return before


def checked_changes(text: str, learner: Learner, steps: int = 0) -> dict[str, Any]:
    """Return the changes that a control file asks for.

    Raises:
        ValueError: it is no mapping of known names to numbers in their ranges, or the learner
            cannot change one of them after ``steps`` steps.
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
        elif name in RATES:
            learner.check_rate(RATES[name])
        else:
            learner.check_kl_coefficient(value, steps)
    return found


def _number(value: Any) -> Any:
    """Return a number that YAML takes for a text, such as 1e-6; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
