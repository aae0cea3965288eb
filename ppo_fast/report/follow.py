"""Follow a growing .jsonl file, which a resumed run may replace or shorten."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from ppo_fast.report.lines import LONGEST, Record, record_of

MARK = 64  # bytes before the place up to which a file was read
MOST = 2000  # objects that one call returns


class Follower:
    """Reads the new lines of a file at each call.

    Args:
        path: of the file; it may not exist yet.
        tail: bytes at the file's end that are read at first; None: all of it.
    """

    def __init__(self, path: Path, tail: int | None = None) -> None:
        self.path, self.tail = path, tail
        self._begun, self._place, self._mark = False, 0, b""

    def read(self) -> tuple[bool, list[Record]]:
        """Return whether the file's lines replace those read before, and the objects of new lines.

        They do where the file is another one, or has changed before the place up to which it was
        read. A last line that has no end yet is left for a later call, and so is what follows after
        ``MOST`` objects.
        """
        try:
            file = self.path.open("rb")
        except OSError:  # not there yet, or just being replaced
            return False, []
        with file:
            replaced = self._begun and not self._goes_on(file)
            if replaced or not self._begun:
                self._begun, self._place = True, self._start(file)
            return replaced, self._new_lines(file)

    def _goes_on(self, file: IO[bytes]) -> bool:
        """Say whether the file still has what was read last, where it was."""
        file.seek(self._place - len(self._mark))
        return file.read(len(self._mark)) == self._mark

    def _start(self, file: IO[bytes]) -> int:
        """Return the place of the first line that is read."""
        size = file.seek(0, os.SEEK_END)
        if self.tail is None or size <= self.tail:
            return 0
        file.seek(size - self.tail - 1)
        file.readline()
        return file.tell()

    def _new_lines(self, file: IO[bytes]) -> list[Record]:
        found: list[Record] = []
        longer = False
        file.seek(self._place)
        while len(found) < MOST and (part := file.readline(LONGEST)):
            ended = part.endswith(b"\n")
            if ended and not longer and (record := record_of(part)) is not None:
                found.append(record)
            longer = not ended
            if ended:
                self._place = file.tell()
        file.seek(max(self._place - MARK, 0))
        self._mark = file.read(min(self._place, MARK))
        return found
