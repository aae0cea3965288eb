"""Output folder of a run: lines of metrics, samples, evaluations and events, and its settings."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ppo_fast.config import PPOConfig
from ppo_fast.disk.files import remove_partial, written
from ppo_fast.disk.lock import FolderLock
from ppo_fast.run_folder.event_log import EventLog
from ppo_fast.run_folder.forget import keep_lines, step_of
from ppo_fast.run_folder.line_files import LineFiles
from ppo_fast.run_folder.sample_lines import or_none, sample_lines, token_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ppo_fast.data.evaluated import Evaluated
    from ppo_fast.data.step import Step

logger = logging.getLogger(__name__)

METRICS, EVENTS, EVALUATIONS = "metrics.jsonl", "events.jsonl", "evaluations.jsonl"
SAMPLES, EVALUATION_SAMPLES = "samples.jsonl", "evaluation_samples.jsonl"
WITH_TOKENS = 4  # sequences of a step whose lines have their tokens


class RunFolder:
    """Output folder of a run. Every line is on disk before the next step; a resumed run appends.

    While lines cannot be written (the disk is full, the folder is gone), they wait in memory, and
    each call tries again. Beyond 64 MiB of them, lines of samples are dropped.

    Use as a context manager: the folder is locked until the end of the block, and warnings of
    ``ppo_fast`` become lines of events.jsonl. Or call ``close``.

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
        names = (METRICS, EVENTS, EVALUATION_SAMPLES, EVALUATIONS, SAMPLES)
        self._lines = LineFiles(folder, names, droppable=(SAMPLES, EVALUATION_SAMPLES))
        self._events = EventLog(self._write_event)
        self._step = 0  # the last one whose metrics were written

    def __enter__(self) -> RunFolder:
        self._events.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except OSError as error:
            if kind is None:
                raise
            logger.warning("%s", error)  # it must not hide why the run ends

    def close(self) -> None:
        """Write the lines that wait, and let other runs into the folder.

        Raises:
            OSError: there are lines that still cannot be written.
        """
        self._events.stop()
        failed = self.flush()
        self._lock.release()
        if failed is not None:
            raise OSError(
                f"output_dir: the last lines of {self.folder} could not be written ({failed})"
            ) from failed

    def flush(self) -> OSError | None:
        """Try to write the lines that wait, and return why they still do; None: none wait."""
        return self._lines.flush() if self._lines.failed is not None else None

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
        self._step = step
        self._append({METRICS: [_numbers(step, metrics)]})

    def write_samples(self, step: Step, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Append a line to samples.jsonl for each sequence.

        It has the score, that of each reward (null where it does not judge), and the other columns
        of the prompt's row. Given the policy's tokenizer, the lines of the first 4 sequences have
        the text of each response token, and the numbers of ``step.per_token``.
        """
        lines = sample_lines(step.number, step.rollout, step.scores, step.rewards)
        if tokenizer is not None and step.per_token:
            tokens = token_lines(step.rollout, step.per_token, tokenizer, WITH_TOKENS)
            for line, found in zip(lines, tokens, strict=False):
                line["tokens"] = found
        self._append({SAMPLES: lines})

    def write_evaluation(self, evaluated: Evaluated) -> None:
        """Append a line to evaluations.jsonl, and one a response to evaluation_samples.jsonl."""
        total = evaluated.scores.total
        scores = total if total.dim() == 1 else total.sum(1)
        step, parts = evaluated.step, evaluated.scores.parts
        self._append(
            {
                EVALUATION_SAMPLES: sample_lines(step, evaluated.rollout, scores, parts),
                EVALUATIONS: [_numbers(step, evaluated.metrics)],
            }
        )

    def read_json(self, name: str) -> dict[str, Any]:
        """Return what ``write_json`` wrote; empty if there is no such file."""
        path = self.folder / name
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    def write_json(self, name: str, contents: Any) -> None:
        """Write a file of JSON, whole or not at all."""
        self._write(name, json.dumps(contents, indent=2, ensure_ascii=False))

    def forget_after(self, step: int, evaluated: Collection[float] | None = None) -> None:
        """Drop the lines of steps after ``step``, which a resumed run computes again.

        After step 0 a run begins anew: all lines are dropped. Else events.jsonl says that it was
        resumed. Warns if metrics.jsonl lacks lines of steps up to ``step``.

        Args:
            step: the last one that is done.
            evaluated: steps of the evaluations that the checkpoint knows of; others are made
                again, and their lines dropped. None: those up to ``step``.
        """
        last = step if step > 0 else -1
        if evaluated is not None:
            keep_lines(self.folder / EVALUATIONS, lambda line: step_of(line) in evaluated)
        for name in (METRICS, SAMPLES, EVALUATIONS, EVENTS):
            keep_lines(self.folder / name, lambda line: step_of(line) <= last)
        known = _steps_in(self.folder / EVALUATIONS)
        # the samples of an evaluation are written before its line
        keep_lines(self.folder / EVALUATION_SAMPLES, lambda line: step_of(line) in known)
        self._lines.forget_sizes()
        self._step = step
        if step > 0:
            line = {"level": "INFO", "source": __name__, "text": f"resumed after step {step}"}
            self._write_event({"time": time.time()} | line)
        done = len(_steps_in(self.folder / METRICS))
        if done and done < step:
            logger.warning("%s has lines of %d of %d steps", self.folder / METRICS, done, step)

    def _write_event(self, line: dict[str, Any]) -> None:
        self._append({EVENTS: [{"step": self._step} | line]})

    def _write(self, name: str, text: str) -> None:
        with written(self.folder / name) as file:
            file.write(text.encode("utf-8", errors="backslashreplace"))

    def _append(self, records: dict[str, list[dict[str, Any]]]) -> None:
        self._lines.append(
            {
                name: [json.dumps(record, ensure_ascii=False) for record in lines]
                for name, lines in records.items()
            }
        )


def _numbers(step: int, metrics: dict[str, float]) -> dict[str, Any]:
    """Return a line of numbers."""
    numbers = {name: or_none(value) for name, value in metrics.items()}
    return {"step": step, "time": time.time()} | numbers


def _steps_in(path: Path) -> set[float]:
    if not path.exists():
        return set()
    with path.open("rb") as file:
        return {step_of(line) for line in file}
