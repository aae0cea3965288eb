"""The checkpoints in a folder: which there are, the newest whole one, and which are kept."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection
from pathlib import Path

from ppo_fast.runs.checkpoint import checkpoint_path

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
        return path
    if first is not None:
        raise first
    return None


def remove_old(folder: Path, keep_last: int | None, keep: Collection[int] = ()) -> None:
    """Remove all but the newest ``keep_last`` checkpoints; None: keep all.

    ``keep`` are steps whose checkpoints stay.
    """
    if keep_last is None:
        return
    for step in list(checkpoints_in(folder))[keep_last:]:
        if step not in keep:
            checkpoint_path(folder, step).unlink(missing_ok=True)
