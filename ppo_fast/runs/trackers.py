"""Callbacks that record a run's steps."""

from __future__ import annotations

from collections.abc import Callable

from ppo_fast.data.step import Step
from ppo_fast.runs.display import StepDisplay
from ppo_fast.runs.folder import RunFolder


def step_logger(folder: RunFolder, display: StepDisplay) -> Callable[[Step], None]:
    """Return an ``on_step`` callback that writes every step to the folder and the console."""

    def log(step: Step) -> None:
        folder.write_metrics(step.number, step.metrics)
        folder.write_samples(step)
        display.show(step)

    return log
