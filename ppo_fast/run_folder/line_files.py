"""Files of lines that a run appends to. Lines that cannot be written wait in memory."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

LIMIT = 64 * 2**20  # bytes of waiting lines, beyond which droppable ones are dropped


class LineFiles:
    """Appends lines to files of a folder; each line is on the disk when ``append`` returns.

    Where that fails (the disk is full, the folder is gone or read-only), one warning says so, the
    lines wait in memory, and each later call tries to write all of them, in their order. A file
    never keeps part of a line: it is cut back to its size before.

    Args:
        folder: the folder; it is not made again if something removes it.
        names: of the files, in the order in which waiting lines are written.
        droppable: those of them whose new lines are dropped while ``LIMIT`` bytes wait.
    """

    def __init__(self, folder: Path, names: Sequence[str], droppable: Collection[str] = ()) -> None:
        self._folder, self._droppable = folder, droppable
        self._waiting: dict[str, list[bytes]] = {name: [] for name in names}
        self._sizes: dict[str, int] = {}  # of the files, as this process left them
        self._torn: set[str] = set()  # files that may end with part of a line
        self._failed: OSError | None = None
        self._dropped = 0
        self._lock = threading.RLock()  # warnings of other threads become lines too
        self._writing = False

    @property
    def failed(self) -> OSError | None:
        """Why lines are waiting; None: none are."""
        return self._failed

    def append(self, lines: Mapping[str, Sequence[str]]) -> None:
        """Append lines, without their line breaks, to files by name."""
        if self._failed is not None:
            self.flush()  # if it can be written again, nothing has to be dropped
        with self._lock:
            said = [self._add(name, texts) for name, texts in lines.items()]
        for message in filter(None, said):  # not under the lock: it may become a line
            logger.warning(message)
        self.flush()

    def flush(self) -> OSError | None:
        """Try to write all waiting lines; return the first error."""
        with self._lock:
            if self._writing:
                # the warning of a signal, whose handler runs amid a write: that writes it too
                return self._failed
            self._writing = True
            try:
                before = self._failed
                said: list[str] = []
                first = self._write_waiting(said)
            finally:
                self._writing = False
            self._failed = first
            if first is not None and before is None:
                said.append(
                    f"output_dir: {self._folder} cannot be written ({first}); the run goes on, its "
                    "lines wait in memory until they can be written"
                )
            elif first is None and before is not None:
                dropped, self._dropped = self._dropped, 0
                without = f", but {dropped} lines of samples" if dropped else ""
                said.append(
                    f"output_dir: {self._folder} can be written again; all lines that waited are "
                    f"in its files{without}"
                )
        for message in said:
            logger.warning(message)
        return first

    def _write_waiting(self, said: list[str]) -> OSError | None:
        """Write the waiting lines, and those that come meanwhile, unless one cannot be written."""
        first = None
        while first is None and any(self._waiting.values()):
            for name, lines in self._waiting.items():
                try:
                    if count := len(lines):
                        said += self._write(name, b"".join(lines[:count]))
                        del lines[:count]
                except OSError as error:
                    first = first or error
        return first

    def forget_sizes(self) -> None:
        """Take the files as they are now: their sizes were changed on purpose."""
        self._sizes.clear()

    def _add(self, name: str, texts: Sequence[str]) -> str | None:
        """Let lines wait, or drop them; return a warning, if any."""
        waiting = sum(len(line) for lines in self._waiting.values() for line in lines)
        if self._failed is None or name not in self._droppable or waiting <= LIMIT:
            # half a character, which UTF-8 has not, becomes the escape that JSON has for it
            data = [f"{text}\n".encode("utf-8", errors="backslashreplace") for text in texts]
            self._waiting[name] += data
            return None
        first, self._dropped = self._dropped == 0, self._dropped + len(texts)
        return (
            f"output_dir: {LIMIT // 2**20} MiB of lines wait to be written; lines of samples are "
            f"dropped until {self._folder} can be written"
            if first
            else None
        )

    def _write(self, name: str, data: bytes) -> list[str]:
        """Append bytes to a file, all or none of them, and put them on the disk.

        Returns:
            Warnings.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        handle = os.open(self._folder / name, flags, 0o666)
        try:
            size = os.fstat(handle).st_size
            known = self._sizes.get(name, size)
            if name in self._torn and size > known:
                os.ftruncate(handle, known)
                size = known
            path = self._folder / name
            shorter = [f"{path}: something else removed or shortened it"] if size < known else []
            self._sizes[name] = size
            self._torn.add(name)
            try:
                _write_all(handle, data)
            except BaseException:
                os.ftruncate(handle, size)  # if this fails too, the next attempt does it
                self._torn.discard(name)
                raise
            self._torn.discard(name)
            self._sizes[name] = size + len(data)
            return shorter
        finally:
            with suppress(OSError):  # what was written is on the disk already
                os.close(handle)


def _write_all(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]
    os.fsync(handle)
