"""Lines of a run's .jsonl files, read so that no file is too large and no line does harm."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

# Bytes of the longest line that is read, and of a file's ends that samples are taken from.
LONGEST = 2**25
# Sums and squares of smaller numbers stay finite.
TOO_LARGE = 1e100

Record = dict[str, Any]


def record_of(line: bytes) -> Record | None:
    """Return the JSON object of a line; None for one that is none or has no step.

    Numbers that JSON does not have (NaN) become None.
    """
    try:
        found = json.loads(line.decode("utf-8", "replace"), parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or as_step(found.get("step")) is None:
        return None
    return found


def as_step(value: object) -> int | None:
    """Return a step's number; None for what is none."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value < 2**53 else None  # type: ignore[operator,return-value]


def as_number(value: object) -> float | None:
    """Return a number as a float; None for anything else, and for one too large to be drawn."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < TOO_LARGE else None


def records(path: Path) -> Iterator[Record]:
    """Yield the objects of a file's lines, without those that are none; none if it is missing."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in lines(file):
            if (record := record_of(line)) is not None:
                yield record


def lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yield a file's lines, and none that is longer than ``LONGEST``."""
    while line := file.readline(LONGEST):
        if len(line) < LONGEST or line.endswith(b"\n"):
            yield line
            continue
        while (part := file.readline(LONGEST)) and not part.endswith(b"\n"):
            pass


def first_step(path: Path) -> list[Record]:
    """Return the objects of the first step in a file, as far as they stand at its beginning."""
    read = 0
    found: list[Record] = []
    for record, size in _sized(path, 0):
        read += size
        if read > LONGEST or (found and record["step"] != found[0]["step"]):
            break
        found.append(record)
    return found


def last_step(path: Path) -> list[Record]:
    """Return the objects of the last step in a file, as far as they stand at its end."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return []
    found = [record for record, _ in _sized(path, max(size - LONGEST, 0))]
    return of_step(found, found[-1]["step"]) if found else []


def of_step(found: Iterable[Record], step: int) -> list[Record]:
    """Return the objects of one step."""
    return [record for record in found if record["step"] == step]


def _sized(path: Path, start: int) -> Iterator[tuple[Record, int]]:
    """Yield the objects of the lines that begin after byte ``start`` - 1, and their bytes."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        if start:
            file.seek(start - 1, os.SEEK_SET)
            file.readline()
        for line in lines(file):
            if (record := record_of(line)) is not None:
                yield record, len(line)
