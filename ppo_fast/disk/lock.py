"""Lock of an output folder, so that one run at a time writes there."""

from __future__ import annotations

import errno
import logging
import os
import socket
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)


class FolderLock:
    """Lock of a folder, taken at once and held until ``release`` or the end of the process.

    The operating system gives it up when the process ends, however it ends. The file ``.lock``
    stays: if it were deleted, two processes could hold two files of that name.

    Args:
        folder: the folder; it exists.
        name: the argument that named it, for errors.

    Raises:
        RuntimeError: another process holds it, or another object of this process.
    """

    def __init__(self, folder: Path, name: str = "output_dir") -> None:
        self._holder = folder / ".lock-holder"
        self._lock = FileLock(folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RuntimeError(
                f"{name}: {folder} is in use by another run, {self._read_holder()}; wait for "
                "its end, or name another folder"
            ) from error
        except (NotImplementedError, OSError) as error:
            unlockable = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
            if isinstance(error, OSError) and error.errno not in unlockable:
                raise ValueError(f"{name}: {folder} cannot be written ({error})") from error
            logger.warning("%s cannot be locked: start no other run in it", folder)
        self._holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", "utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the lock up. A second call does nothing."""
        if self._lock.is_locked:
            self._holder.unlink(missing_ok=True)
            self._lock.release()

    def _read_holder(self) -> str:
        try:
            return self._holder.read_text("utf-8") or "a process that is just starting"
        except FileNotFoundError:  # between taking the lock and writing the name
            return "a process that is just starting"
