"""RunWriter: a callback that writes a run to its folder and shows its steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ppo_fast.data.evaluated import Evaluated
from ppo_fast.data.step import Step
from ppo_fast.run_folder.folder import RunFolder
from ppo_fast.runs.callbacks import Callback
from ppo_fast.runs.display import StepDisplay

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RunWriter(Callback):
    """Writes metrics, samples and evaluations to a run's folder, and shows each step.

    Args:
        folder: of the run.
        display: shows a line a step; None: nothing is shown.
        tokenizer: the policy's, for the texts of single tokens; None: samples have no tokens.
    """

    def __init__(
        self,
        folder: RunFolder,
        display: StepDisplay | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.folder, self.display, self.tokenizer = folder, display, tokenizer

    def on_step(self, step: Step) -> None:
        self.folder.write_metrics(step.number, step.metrics)
        self.folder.write_samples(step, self.tokenizer)
        if self.display is not None:
            self.display.show(step)

    def on_evaluate(self, evaluated: Evaluated) -> None:
        self.folder.write_evaluation(evaluated)

    def on_save(self, step: int, path: Path) -> None:
        # a resumed run does not write the lines before a checkpoint again
        self.folder.flush()
