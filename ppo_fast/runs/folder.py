"""Output folder of a run: metrics.jsonl, samples.jsonl, the resolved config, the trained policy."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ppo_fast.config import PPOConfig
from ppo_fast.data.step import Step
from ppo_fast.runs.files import remove_partial, written
from ppo_fast.runs.lock import FolderLock


class RunFolder:
    """Output folder of a run. Every line is on disk before the next step; a resumed run appends.

    Use as a context manager, or call ``close``: the folder is locked until then.

    Args:
        folder: its path; made if it does not exist.

    Raises:
        RuntimeError: another run is in the folder; its process is named.
        OSError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(folder)
            remove_partial(folder)
        except OSError as error:
            raise OSError(f"output_dir: {folder} cannot be written ({error})") from error

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other runs into the folder."""
        self._lock.release()

    def write_config(self, config: PPOConfig, **run: Any) -> None:
        """Write the resolved settings to config.yaml, which ``ppo-fast train --config`` reads."""
        settings = {key: str(v) if isinstance(v, Path) else v for key, v in run.items()}
        both = settings | asdict(config)
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in both.items()}
        self._write("config.yaml", yaml.safe_dump(fields, sort_keys=False))

    def write_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line to metrics.jsonl.

        Numbers that are not finite, which JSON does not have, become null.
        """
        numbers = {name: _or_none(value) for name, value in metrics.items()}
        self._append("metrics.jsonl", [{"step": step, "time": time.time()} | numbers])

    def write_samples(self, step: Step) -> None:
        """Append a line to samples.jsonl for each sequence.

        It has the score, that of each reward (null where it does not judge), and the other columns
        of the prompt's row.
        """
        rollout = step.rollout
        rewards = {name: part.tolist() for name, part in step.rewards.items()}
        columns = rollout.columns
        rows = zip(rollout.prompts, rollout.completions, step.scores.tolist(), strict=True)
        lines = []
        for i, (prompt, completion, score) in enumerate(rows):
            line: dict[str, Any] = {
                "step": step.number, "prompt": prompt, "completion": completion, "score": score,
            }  # fmt: skip
            if len(rewards) > 1:
                line["rewards"] = {
                    k: v[i] if math.isfinite(v[i]) else None for k, v in rewards.items()
                }
            if columns:
                line["columns"] = {name: _as_json(values[i]) for name, values in columns.items()}
            lines.append(line)
        self._append("samples.jsonl", lines)

    def read_json(self, name: str) -> dict[str, Any]:
        """Return what ``write_json`` wrote; empty if there is no such file."""
        path = self.folder / name
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    def write_json(self, name: str, contents: Any) -> None:
        """Write a file of JSON, whole or not at all."""
        self._write(name, json.dumps(contents, indent=2, ensure_ascii=False))

    def _write(self, name: str, text: str) -> None:
        with written(self.folder / name) as file:
            file.write(text.encode("utf-8", errors="backslashreplace"))

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps after ``step``, which a resumed run computes again."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.folder / name
            if path.exists():
                lines = path.read_text("utf-8", errors="replace").split("\n")
                self._write(name, "".join(f"{x}\n" for x in lines if _step_of(x) <= step))

    def _append(self, name: str, records: list[dict[str, Any]]) -> None:
        """Append lines to a file, and put them on the disk before a checkpoint counts on them."""
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with (self.folder / name).open("ab") as file:
            # half a character, which UTF-8 has not, becomes the escape that JSON has for it
            file.write(text.encode("utf-8", errors="backslashreplace"))
            file.flush()
            os.fsync(file.fileno())


def _or_none(value: float) -> float | None:
    """Return None for a number that JSON does not have."""
    return value if math.isfinite(value) else None


def _as_json(value: Any) -> Any:
    """Return ``value``, or as a text if JSON does not have it."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return str(value)
    return value


def _step_of(line: str) -> float:
    """Return the step of a line; infinity for one that a killed run left half written."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
