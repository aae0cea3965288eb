"""Run: what a run's folder holds, as the report shows it."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ppo_fast.report.courses import Courses
from ppo_fast.report.lines import Record, as_number, first_step, last_step, records

MOST_RUNS = 12
MOST_EVENTS = 200
MOST_EVALUATIONS = 2000
LARGEST_CONFIG = 2**20  # bytes
# Files of which a run's folder has one at least.
FILES = ("config.yaml", "metrics.jsonl", "evaluations.jsonl", "evaluation.json", "events.jsonl")


@dataclass(frozen=True)
class Ends:
    """Samples of the first and of the last step that have some; the same ones if there is one.

    first: may be empty, where lines at the file's beginning are too long.
    last: empty without samples.
    """

    first: list[Record]
    last: list[Record]


@dataclass(frozen=True)
class Run:
    """Contents of a run's folder.

    name: the folder's, with as much of its path as sets it apart from the other runs.
    config: settings by name; empty if there is no config.yaml.
    evaluations: by rising step.
    events: the last ones; event_count: of all.
    """

    name: str
    config: dict[str, Any]
    courses: Courses
    evaluations: list[Record]
    samples: Ends
    evaluation_samples: Ends
    events: list[Record]
    event_count: int


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the folders of runs; files that are missing or half written are left out.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a folder that is no run's, one that is named twice, none or too many of them.
    """
    if not 1 <= len(folders) <= MOST_RUNS:
        raise ValueError(
            f"RUN: got {len(folders)} folders, expected 1 to {MOST_RUNS}: "
            "ppo-fast report runs/a runs/b"
        )
    places = [check_folder(folder).resolve() for folder in folders]
    if len({*places}) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise ValueError(f"RUN: {twice} is named twice")
    return [_read(*both) for both in zip(places, _names(places), strict=True)]


def check_folder(folder: Path) -> Path:
    """Return the folder of a run.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is a file, or has no file of a run.
    """
    if not folder.exists():
        raise FileNotFoundError(f"RUN: no folder {folder}")
    if not folder.is_dir():
        raise ValueError(f"RUN: {folder} is a file; name the folder that it is in")
    if not any((folder / name).is_file() for name in FILES):
        raise ValueError(
            f"RUN: {folder} holds no run: it has none of {', '.join(FILES)}; "
            "name the --output-dir of a run"
        )
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Return the settings of config.yaml; empty where it is missing or no mapping of names."""
    path = folder / "config.yaml"
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            return {}
        found = yaml.safe_load(path.read_text("utf-8", "replace"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return {str(name): value for name, value in found.items()} if isinstance(found, dict) else {}


def _names(places: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ."""
    for length in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-length:]) for place in places]
        if len({*names}) == len(names):
            break
    return names


def _read(folder: Path, name: str) -> Run:
    courses = Courses()
    for record in records(folder / "metrics.jsonl"):
        courses.add(record)
    courses.drop_empty()
    events: deque[Record] = deque(maxlen=MOST_EVENTS)
    count = 0
    for record in records(folder / "events.jsonl"):
        events.append(record)
        count += 1
    return Run(
        name,
        read_config(folder),
        courses,
        read_evaluations(folder, courses.step),
        _ends(folder / "samples.jsonl"),
        _ends(folder / "evaluation_samples.jsonl"),
        [*events],
        count,
    )


def _ends(path: Path) -> Ends:
    last = last_step(path)
    return Ends(first_step(path) if last else [], last)


def read_evaluations(folder: Path, last: int) -> list[Record]:
    """Return the evaluations, by rising step, with their numbers alone; None for other values.

    A folder without evaluations.jsonl may have evaluation.json, with one before and one after the
    ``last`` step.
    """
    by_step = {record["step"]: record for record in records(folder / "evaluations.jsonl")}
    found = [by_step[step] for step in sorted(by_step)] or _before_and_after(folder, last)
    kept = found[-MOST_EVALUATIONS:]
    if kept and kept[0] is not found[0]:
        kept[0] = found[0]
    return [
        {name: value if name == "step" else as_number(value) for name, value in record.items()}
        for record in kept
    ]


def _before_and_after(folder: Path, last: int) -> list[Record]:
    try:
        found = json.loads((folder / "evaluation.json").read_text("utf-8", "replace"))
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(found, dict):
        return []
    steps = {"before": 0, "after": last}
    return [
        {**found[name], "step": step} for name, step in steps.items()
        if isinstance(found.get(name), dict)
    ]  # fmt: skip
