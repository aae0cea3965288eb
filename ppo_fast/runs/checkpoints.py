"""The checkpoints of a run: when they are written, and which are kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from ppo_fast.checkpointing.checkpoint import checkpoint_path, folder_path, make_folder
from ppo_fast.checkpointing.kept import remove_old
from ppo_fast.disk.files import remove_partial
from ppo_fast.disk.lock import FolderLock
from ppo_fast.runs.progress import Progress

logger = logging.getLogger(__name__)


class Saves(Protocol):
    """Interface of PPO that checkpoints use."""

    progress: Progress
    newest_checkpoint: Path | None

    @property
    def amid_update(self) -> bool:
        """Whether an update was broken off, so that the weights are those of no whole step."""
        ...

    def save_checkpoint(self, checkpoint_dir: str | Path, step: int) -> Path: ...


class Checkpoints:
    """Writes a run's checkpoints. Use as a context manager: the folder is locked within.

    Args:
        ppo: the trainer.
        folder: where they go; None: nowhere.
        keep_last: number that are kept, the newest; None: all.
        best: returns the steps whose checkpoints are kept besides the newest.
        on_save: told of each that was written.

    Attributes:
        failed: the error of the last one, if it could not be written.
    """

    def __init__(
        self,
        ppo: Saves,
        folder: str | Path | None,
        keep_last: int | None,
        best: Callable[[], Collection[int]] = tuple,
        on_save: Callable[[int, Path], None] = lambda step, path: None,
    ) -> None:
        self._ppo, self._keep_last = ppo, keep_last
        self._best, self._on_save = best, on_save
        self.folder = None if folder is None else folder_path(folder)
        self.failed: OSError | None = None
        if self.folder is not None:
            make_folder(self.folder)

    def __enter__(self) -> Checkpoints:
        if self.folder is not None:
            self._lock = FolderLock(self.folder, "checkpoint_dir")
            remove_partial(self.folder)  # what killed runs left half written
        return self

    def __exit__(self, *error: object) -> None:
        if self.folder is not None:
            self._lock.release()

    def save(self) -> bool:
        """Write one, and remove those that are not kept; say whether nothing is left to write.

        Where the disk is full or gone, this is logged: a run goes on.
        """
        if self.folder is None:
            return True
        try:
            self._write(self.folder)
        except OSError as error:
            logger.warning("%s; the run goes on, and tries again at the next checkpoint", error)
            self.failed = error
            return False
        return True

    def _write(self, folder: Path) -> None:
        step = self._ppo.progress.steps
        path = self._ppo.save_checkpoint(folder, step)
        remove_old(folder, step, self._keep_last, self._best())
        self.failed = None
        self._on_save(step, path)

    def keep(self, why: str) -> None:
        """Write one of what was trained so far, if possible, and log where it is."""
        step = self._ppo.progress.steps
        if step == 0:
            return  # there is nothing to keep, and the error says the rest
        where = "no checkpoint_dir was given; the weights are in the policy"
        if self.folder is not None:
            path = checkpoint_path(self.folder, step)
            where = f"checkpoint {path}"
            newest = self._ppo.newest_checkpoint
            if self._ppo.amid_update:
                # these weights are of no step: a run resumed from them would not be the same
                where = f"during the update of the next step; newest checkpoint: {newest}"
            elif path.resolve() != newest:
                try:
                    self._write(self.folder)
                except Exception as error:  # of callbacks too; it must not hide why the run ends
                    where = f"{error}; newest checkpoint: {newest}"
        logger.warning("stopped by %s after step %d: %s", why, step, where)
