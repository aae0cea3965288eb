"""The checkpoints in a folder: which there are, the newest whole one, and which are kept."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection
from pathlib import Path

from ppo_fast.checkpointing.checkpoint import checkpoint_path

logger = logging.getLogger(__name__)

NAME = re.compile(r"ppo_checkpoint_step_(\d+)\.pt")


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Return the checkpoints in ``folder`` by step, the newest first; other files are ignored."""
    files = folder.iterdir() if folder.is_dir() else ()
    found = {int(m[1]): path for path in files if (m := NAME.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


def load_newest(folder: Path, load: Callable[[Path], int]) -> Path | None:
    """Load the newest checkpoint in ``folder`` that can be loaded.

    Args:
        folder: of the checkpoints.
        load: loads one; if it raises ValueError, it has changed nothing.

    Returns:
        Its path; None: there is no checkpoint.

    Raises:
        ValueError: there are some, and none can be loaded; the newest's error.
    """
    first: ValueError | None = None
    for path in checkpoints_in(folder).values():
        try:
            load(path)
        except ValueError as error:
            first = first or error
            continue
        if first is not None:
            logger.warning("%s; %s is loaded instead", first, path.name)
            _set_aside(folder, newer_than=path)
        return path
    if first is not None:
        raise first
    return None


def _set_aside(folder: Path, newer_than: Path) -> None:
    """Rename the checkpoints that could not be loaded, so that the run's own take their names."""
    found = checkpoints_in(folder)
    step = next(number for number, path in found.items() if path == newer_than)
    for number, path in found.items():
        if number > step:
            path.replace(path.with_name(f"{path.name}.damaged"))


def remove_old(
    folder: Path, written: int, keep_last: int | None, best: Collection[int] = ()
) -> None:
    """Remove checkpoints up to the one of step ``written``, but for those that are kept.

    Those of later steps stay: they are damaged, or of another course of the run.

    Args:
        folder: of the checkpoints.
        written: the step of the newest.
        keep_last: number that are kept, the newest; None: all.
        best: steps whose checkpoints are kept too.
    """
    if keep_last is None:
        return
    steps = [step for step in checkpoints_in(folder) if step <= written]
    for step in steps[keep_last:]:
        if step not in best:
            checkpoint_path(folder, step).unlink(missing_ok=True)
