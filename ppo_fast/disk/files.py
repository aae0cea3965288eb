"""Write files whole or not at all, and on the disk itself before their names change."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

# Names of what is half written begin and end with these.
HALF, PARTIAL = ".ppo_fast-", ".partial"


@contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """Within the block, write to the yielded file; then it takes the name ``path``.

    The file is on the disk before it is renamed, and so is the folder's new entry afterwards. If
    the block raises, or the machine stops, a file that had the name before is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=HALF + path.name, suffix=PARTIAL)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp lets the user alone read it
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _umask() -> int:
    """Return the bits that new files of this process lack; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


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
    for path in folder.glob(f"{HALF}*{PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def written_folder(folder: Path) -> Iterator[Path]:
    """Within the block, write to the yielded folder; then it takes the place of ``folder``.

    If the block raises, or the process is killed, a ``folder`` that was there stays as it was. All
    files are on the disk before the folder gets its name.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=HALF + folder.name, suffix=PARTIAL, ignore_cleanup_errors=True
    ) as temporary:
        new = Path(temporary) / folder.name
        new.mkdir()
        yield new
        for path in new.rglob("*"):
            if path.is_file():
                _sync_file(path)
        sync_folder(new)
        if not folder.exists():
            new.rename(folder)
        elif not _exchange(new, folder):
            folder.rename(Path(temporary) / "before")
            new.rename(folder)
        sync_folder(folder.parent)


def _sync_file(path: Path) -> None:
    # some systems flush only what is open for writing
    with path.open("rb") as file, suppress(OSError):
        os.fsync(file.fileno())


def _exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two folders in one step; False where the system cannot do it."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2  # Linux
    except (AttributeError, OSError, TypeError):
        return False
    current, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(current, os.fsencode(first), current, os.fsencode(second), exchange) == 0
