"""Output folder of a run: metrics.jsonl, samples.jsonl, the resolved config, the trained policy."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ppo_fast.config import PPOConfig
from ppo_fast.data.step import Step
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
        text = yaml.safe_dump(fields, sort_keys=False)
        (self.folder / "config.yaml").write_text(text, "utf-8")

    def write_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line to metrics.jsonl.

        Numbers that are not finite, which JSON does not have, become null.
        """
        numbers = {name: _or_none(value) for name, value in metrics.items()}
        self._append("metrics.jsonl", {"step": step, "time": time.time()} | numbers)

    def write_samples(self, step: Step) -> None:
        """Append a line to samples.jsonl for each sequence.

        It has the score, that of each reward (null where it does not judge), and the other columns
        of the prompt's row.
        """
        rollout = step.rollout
        rewards = {name: part.tolist() for name, part in step.rewards.items()}
        columns = rollout.columns
        rows = zip(rollout.prompts, rollout.completions, step.scores.tolist(), strict=True)
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
            self._append("samples.jsonl", line)

    def read_json(self, name: str) -> dict[str, Any]:
        """Return what ``write_json`` wrote; empty if there is no such file."""
        path = self.folder / name
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    def write_json(self, name: str, contents: Any) -> None:
        """Write a file of JSON, whole or not at all."""
        new = self.folder / f"{name}.partial"
        new.write_text(json.dumps(contents, indent=2, ensure_ascii=False), "utf-8")
        new.replace(self.folder / name)

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps after ``step``, which a resumed run computes again."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path, new = self.folder / name, self.folder / f"{name}.partial"
            if path.exists():
                lines = path.read_text("utf-8").split("\n")
                kept = [line for line in lines if _step_of(line) <= step]
                new.write_text("".join(line + "\n" for line in kept), "utf-8")
                new.replace(path)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        # half a character, which UTF-8 has not, becomes the escape that JSON has for it
        path = self.folder / name
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


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
    except json.JSONDecodeError:
        return math.inf


def save_policy(policy: Any, tokenizer: Any, folder: Path) -> None:
    """Save the policy and its tokenizer in ``folder`` by ``save_pretrained``.

    Adapters are merged: it is a whole model. A ``folder`` that exists is replaced when the new one
    is complete.
    """
    from ppo_fast.models.adapters import merged_adapters
    from ppo_fast.models.parts import base_of

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary) / folder.name
        with merged_adapters(policy):
            base_of(policy).save_pretrained(new)
        tokenizer.save_pretrained(new)
        if folder.exists():
            shutil.move(folder, Path(temporary) / "old")
        shutil.move(new, folder)
