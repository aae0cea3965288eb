"""Write files whole or not at all, and on the disk itself before their names change."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

PARTIAL = ".partial"


@contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """Within the block, write to the yielded file; then it takes the name ``path``.

    The file is on the disk before it is renamed, and so is the folder's new entry afterwards. If
    the block raises, or the machine stops, a file that had the name before is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=PARTIAL)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk, where the system can do it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError:  # some network file systems
        pass
    finally:
        os.close(handle)


def remove_partial(folder: Path) -> None:
    """Remove what runs that were killed have left half written in ``folder``."""
    for path in folder.glob(f"*{PARTIAL}"):
        if path.is_file():
            path.unlink(missing_ok=True)
