"""Console output of a run: one line per step, and a progress bar."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ppo_fast.data.step import Step


class ProgressBar:
    """Progress bar on a terminal: steps done, the last step's reward and KL, and the time left.

    Use as a context manager; call ``advance`` after every step.
    """

    def __init__(self, num_steps: int, *, shown: bool = True) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("PPO"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not shown or not console.is_terminal,
        )
        self._task = self._bar.add_task("PPO", total=num_steps, numbers="")

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, metrics: dict[str, float]) -> None:
        """Count one more step, and show its reward and KL."""
        numbers = f"reward {metrics['mean_reward']:.3g}, KL {metrics['kl_divergence']:.3g}"
        self._bar.update(self._task, advance=1, numbers=numbers)


class StepDisplay:
    """One line per step and, on a terminal, a progress bar with the time left under it.

    Use as a context manager; call ``show`` after every step.
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

    def show(self, step: Step) -> None:
        """Print the line of a step."""
        self.done += 1
        metrics, tokens = step.metrics, int(step.rollout.tokens.response_lengths.sum())
        parts = [metrics[f"time/{part}"] for part in ("rollout", "experience", "update")]
        elapsed = time.perf_counter() - self.started
        left = elapsed / self.done * (self.num_steps - self.done)
        line = (
            f"step {step.number:3d}  reward {metrics['mean_reward']:+.3f}  "
            f"KL {metrics['kl_sequence']:6.2f}/seq  clip {metrics.get('clip_fraction', 0.0):.3f}  "
            f"entropy {metrics['entropy']:.2f}  {tokens / parts[0]:4.0f} tok/s  "
            f"rollout {parts[0]:.1f}s experience {parts[1]:.1f}s update {parts[2]:.1f}s  "
            f"left {left / 60:.1f} min"
        )
        self.progress.console.print(line, highlight=False, soft_wrap=True, markup=False)
        self.progress.advance(self.task)
