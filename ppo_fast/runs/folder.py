"""Where a run's numbers go: metrics.jsonl, samples.jsonl, the resolved config, the console."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ppo_fast.config import PPOConfig
from ppo_fast.rollout import Rollout

if TYPE_CHECKING:
    from ppo_fast.trainer import PPOTrainer


class RunFolder:
    """A run's output folder. Every line is on disk before the next step begins; a resumed run
    appends.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write_config(self, config: PPOConfig, **run: Any) -> None:
        """The resolved settings as config.yaml, which ``ppo-fast train --config`` reads."""
        settings = {key: str(v) if isinstance(v, Path) else v for key, v in run.items()}
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
        text = yaml.safe_dump(settings | fields, sort_keys=False)
        (self.folder / "config.yaml").write_text(text, "utf-8")

    def write_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl; what is not finite, which JSON does not know, is null."""
        numbers = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
        self._append("metrics.jsonl", {"step": step, "time": time.time()} | numbers)

    def write_samples(self, step: int, rollout: Rollout, scores: Tensor) -> None:
        """A line of samples.jsonl for each sequence."""
        rows = zip(rollout.prompts, rollout.completions, scores.tolist(), strict=True)
        for prompt, completion, score in rows:
            self._append(
                "samples.jsonl",
                {"step": step, "prompt": prompt, "completion": completion, "score": score},
            )

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps beyond ``step``: a resumed run goes through them again."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path, new = self.folder / name, self.folder / f"{name}.partial"
            if path.exists():
                lines = path.read_text("utf-8").split("\n")
                kept = [line for line in lines if _step_of(line) <= step]
                new.write_text("".join(line + "\n" for line in kept), "utf-8")
                new.replace(path)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _step_of(line: str) -> float:
    """The step of a line; infinity for one that a killed run left half written."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


class StepDisplay:
    """One line a step and, on a terminal, a progress bar with the time left under it.

    Use as a context manager; ``show`` after every step.
    """

    def __init__(self, console: Console, num_steps: int) -> None:
        self.console, self.num_steps, self.done = console, num_steps, 0
        self.started = time.perf_counter()
        self.progress = Progress(
            TextColumn("PPO"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("PPO", total=num_steps)

    def __enter__(self) -> StepDisplay:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def show(self, step: int, metrics: dict[str, float], tokens: int) -> None:
        """A step's line; ``tokens`` were generated in it."""
        self.done += 1
        parts = [metrics[f"time/{part}"] for part in ("rollout", "experience", "update")]
        elapsed = time.perf_counter() - self.started
        left = elapsed / self.done * (self.num_steps - self.done)
        line = (
            f"step {step:3d}  reward {metrics['mean_reward']:+.3f}  "
            f"KL {metrics['kl_sequence']:6.2f}/seq  clip {metrics['clip_fraction']:.3f}  "
            f"entropy {metrics['entropy']:.2f}  {tokens / parts[0]:4.0f} tok/s  "
            f"rollout {parts[0]:.1f}s experience {parts[1]:.1f}s update {parts[2]:.1f}s  "
            f"left {left / 60:.1f} min"
        )
        self.progress.console.print(line, highlight=False, soft_wrap=True)
        self.progress.advance(self.task)


def step_logger(
    trainer: PPOTrainer, folder: RunFolder, display: StepDisplay
) -> Callable[[dict[str, float]], None]:
    """An ``on_step`` for ``trainer.train``: every step to the folder and to the console."""

    def log(metrics: dict[str, float]) -> None:
        step = int(trainer.stats["total_steps"])
        rollout, scores = trainer.last_rollout, trainer.last_scores
        assert rollout is not None
        assert scores is not None
        folder.write_metrics(step, metrics)
        folder.write_samples(step, rollout, scores)
        display.show(step, metrics, int(rollout.tokens.response_lengths.sum()))

    return log
