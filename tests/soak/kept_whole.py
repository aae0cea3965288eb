"""What the folder of a killed run must still hold, and that of a finished one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from ppo_fast.checkpointing.checkpoint import checkpoint_path, load
from ppo_fast.checkpointing.kept import checkpoints_in
from ppo_fast.disk.files import HALF

TIMES = ("time", "perf/")
LOGS = ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "evaluation_samples.jsonl")


def lost(folder: Path, saved: int, *, exported: bool) -> Iterator[str]:
    """Yield what a run's folder lacks after its process was killed, at any moment.

    Args:
        folder: of the run.
        saved: step of the newest checkpoint that was reported as written.
        exported: whether ``policy/`` was there before.
    """
    found = checkpoints_in(folder / "checkpoints")
    if max(found, default=0) < saved:
        yield f"checkpoint of step {saved} is gone; there are those of {[*found]}"
    for path in found.values():
        try:
            load(path)
        except ValueError as error:
            yield f"half written under its final name: {error}"
    for name in ("metrics.jsonl", "samples.jsonl"):
        steps = [line["step"] for line in lines(folder / name)]
        if missing := {*range(1, max(found, default=0) + 1)} - {*steps}:
            yield f"{name} lacks steps {sorted(missing)} of the newest checkpoint"
    for name in ("config.yaml", "evaluation.json"):
        if (folder / name).exists() and not (folder / name).read_text("utf-8").strip():
            yield f"{name} is empty"
    for name in ("policy", "critic"):
        if (folder / name).exists():
            yield from damage_of_export(folder / name)
    if exported and not (folder / "policy").exists():
        yield "policy/ is gone"


def damage_of_export(folder: Path) -> Iterator[str]:
    """Yield what is wrong with a folder of exported weights."""
    weights = [*folder.glob("*.safetensors")]
    if not weights:
        yield f"{folder.name}/ has no weights, only {sorted(p.name for p in folder.iterdir())}"
    for path in weights:
        try:
            load_file(path)
        except (SafetensorError, OSError) as error:
            yield f"{folder.name}/{path.name} cannot be loaded: {error}"
    for path in folder.glob("*.json"):
        try:
            json.loads(path.read_text("utf-8"))
        except ValueError as error:
            yield f"{folder.name}/{path.name} is half written: {error}"
    card = folder / "README.md"
    if card.exists() and "---" not in card.read_text("utf-8")[3:]:
        yield f"{folder.name}/README.md is half written"


def differences(folder: Path, reference: Path, steps: int) -> Iterator[str]:
    """Yield in what the folder of a finished run differs from that of a run without a kill."""
    path = checkpoint_path(folder / "checkpoints", steps)
    if not path.exists():
        yield f"no {path.name}; there are {[*checkpoints_in(folder / 'checkpoints')]}"
        return
    own, expected = (load(checkpoint_path(f / "checkpoints", steps)) for f in (folder, reference))
    if own["manifest"] != expected["manifest"]:
        tensors, others = own["manifest"]["tensors"], expected["manifest"]["tensors"]
        names = [name for name in others if tensors.get(name) != others[name]]
        yield f"the last checkpoint differs in {names[:3] or 'its numbers'}"
    for name in LOGS:
        if without_times(lines(folder / name)) != without_times(lines(reference / name)):
            steps_of = [line["step"] for line in lines(folder / name)]
            yield f"{name} differs; it has steps {steps_of}"
    for name in ("policy", "critic"):
        yield from _difference_of_folders(folder / name, reference / name)
    if left := [str(p.relative_to(folder)) for p in folder.rglob(f"{HALF}*")]:
        yield f"left half written: {left}"


def _difference_of_folders(folder: Path, reference: Path) -> Iterator[str]:
    own, expected = (
        {p.name: p.read_bytes() for p in f.iterdir()} if f.exists() else {}
        for f in (folder, reference)
    )
    if own.keys() != expected.keys():
        yield f"{folder.name}/ has {sorted(own)}, expected {sorted(expected)}"
    cards = "README.md"  # has the folder's name and times
    for name in own.keys() & expected.keys() - {cards}:
        if own[name] != expected[name]:
            yield f"{folder.name}/{name} differs"


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of JSON; a last line that is half written is left out."""
    if not path.exists():
        return []
    found = path.read_text("utf-8", errors="replace").split("\n")[:-1]
    return [json.loads(line) for line in found]


def without_times(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines without what no two runs have in common."""
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in found]
