"""The run of ``ppo-fast train``: from a new or an old folder to its results."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from signal import Signals
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.table import Table

from ppo_fast.checkpointing.checkpoint import checkpoint_path
from ppo_fast.checkpointing.kept import checkpoints_in, load_newest
from ppo_fast.checkpointing.space import weights_bytes
from ppo_fast.cli.results import results_are_saved, save_results
from ppo_fast.data.evaluated import Evaluated
from ppo_fast.data.examples import Example, Stream
from ppo_fast.exports.export import check_token_classifier
from ppo_fast.ppo import PPO
from ppo_fast.run_folder.folder import RunFolder
from ppo_fast.run_folder.run_writer import RunWriter
from ppo_fast.runs.callbacks import Callback
from ppo_fast.runs.display import StepDisplay
from ppo_fast.runs.evaluation import Evaluation, Evaluator
from ppo_fast.runs.plain_text import plain

if TYPE_CHECKING:
    from ppo_fast.cli.train import Train

logger = logging.getLogger(__name__)

# The status of a process that did not finish and can be run again (EX_TEMPFAIL of sysexits.h).
TIME_IS_UP = 75


class TrainRun:
    """A run of the command.

    Args:
        settings: the command.
        console: what is printed to.
        prompts: to train on.
        evaluation: of the held-out prompts; None: there are none.
        trackers: callbacks that report the run.
        make_ppo: makes the trainer, once the folder is locked.
        ends: time of ``time.monotonic`` at which to end; None: there is no limit.
    """

    def __init__(
        self,
        settings: Train,
        console: Console,
        *,
        prompts: list[Example] | Stream,
        evaluation: Evaluation | None,
        trackers: list[Callback],
        make_ppo: Callable[[], PPO],
        ends: float | None,
    ) -> None:
        self.settings, self.console, self.prompts = settings, console, prompts
        self.evaluation, self.trackers, self.ends = evaluation, trackers, ends
        self.make_ppo = make_ppo
        self.checkpoints = settings.output_dir / "checkpoints"

    def run(self) -> None:
        """Train and save the results; or do what is left of a run that was stopped."""
        with RunFolder(self.settings.output_dir) as folder:
            found = [path.name for path in checkpoints_in(self.checkpoints).values()]
            if found and not self.settings.resume:
                raise ValueError(
                    f"--output-dir: {self.settings.output_dir} holds a run ({found[0]}); continue "
                    "it with --resume, or name another folder"
                )
            ppo = self.make_ppo()
            if (newest := load_newest(self.checkpoints, ppo.load_checkpoint)) is not None:
                self.console.print(plain(f"resumed {newest} after step {ppo.progress.steps}"))
            evaluated = {found["step"] for found in ppo.progress.evaluations}
            if self.settings.save_critic == "whole":
                _check_whole_critic(ppo)
            self.evaluator = Evaluator(ppo, self.evaluation)
            if self._is_done(ppo):
                steps, most = ppo.progress.steps, self.settings.num_steps
                done = f"all {most} steps are done" if steps == most else f"it ended at {steps}"
                self.console.print(f"nothing is left to do: {done}", highlight=False)
                return
            ppo.check_space(
                self.checkpoints,
                num_steps=self.settings.num_steps,
                checkpoint_freq=self.settings.checkpoint_freq,
                keep_last=self.settings.keep_last,
                keep_best=0 if self.evaluation is None else self.evaluation.keep_best,
                name="output_dir",
                exports=self._exports(ppo),
            )
            folder.write_config(ppo.config, **self.settings.own_settings())
            folder.forget_after(ppo.progress.steps, evaluated)
            if self.settings.num_steps > ppo.progress.steps:
                self._train(ppo, folder)
            self._evaluate_last(ppo, folder)
            self._save(ppo)

    def _is_done(self, ppo: PPO) -> bool:
        """Return whether all steps are done and the results are saved."""
        done, most = ppo.progress.steps, self.settings.num_steps
        if most < done:
            raise ValueError(f"--num-steps: got {most}, expected at least the {done} done")
        if most > done and not self.evaluator.exhausted:
            return False
        return not self.evaluator.due(last=True) and results_are_saved(
            self.settings.output_dir, done, self._step_to_export(ppo)
        )

    def _train(self, ppo: PPO, folder: RunFolder) -> None:
        settings, left = self.settings, self.settings.num_steps - ppo.progress.steps
        with StepDisplay(self.console, left) as display:
            shown = [RunWriter(folder, display, ppo.tokenizer), ShownEvaluations(self.console)]
            result = ppo.train(
                self.prompts,
                left,
                settings.batch_size,
                checkpoint_dir=self.checkpoints,
                checkpoint_freq=settings.checkpoint_freq,
                keep_last=settings.keep_last,
                max_time=None if self.ends is None else max(self.ends - time.monotonic(), 1e-3),
                evaluation=self.evaluation,
                callbacks=[*shown, *self.trackers],
                control=settings.output_dir / "control.yaml",
                progress=False,
            )
        if result["interrupted"] and ppo.progress.steps < settings.num_steps:
            self._end_early(ppo, result["stopped_by"])

    def _end_early(self, ppo: PPO, stopped_by: str) -> NoReturn:
        """End the process after a signal or at the time limit, before the last step."""
        most = self.settings.num_steps
        left = f"{most - ppo.progress.steps} of {most} steps are left: --resume goes on"
        self.console.print(left, soft_wrap=True)
        raise SystemExit(TIME_IS_UP if stopped_by == "max_time" else 128 + Signals[stopped_by])

    def _evaluate_last(self, ppo: PPO, folder: RunFolder) -> None:
        """Make the last evaluation, if the run was stopped before it."""
        if self.evaluator.due(last=True):
            evaluated = self.evaluator.run()
            for one in (RunWriter(folder), ShownEvaluations(self.console)):
                one.on_evaluate(evaluated)
            ppo.save_checkpoint(self.checkpoints, ppo.progress.steps)  # with the evaluation

    def _step_to_export(self, ppo: PPO) -> int:
        """Return the step whose weights policy/ gets: the best that there is, or the last."""
        last = ppo.progress.steps
        if self.settings.export_from == "last":
            return last
        for step in self.evaluator.ranked:
            if step == last or checkpoint_path(self.checkpoints, step).exists():
                return step
            if step > 0:
                logger.warning("step %d is the best, but its checkpoint is gone", step)
            else:
                logger.warning("no evaluation is better than the one before training")
        return last

    def _save(self, ppo: PPO) -> None:
        """Print the evaluations, and save policy/ and critic/."""
        last = ppo.progress.steps
        if len(ppo.progress.evaluations) > 1:
            self.console.print(evaluations_table(ppo.progress.evaluations))
        step = self._step_to_export(ppo)
        if step != last:
            ppo.load_checkpoint(checkpoint_path(self.checkpoints, step))
            self.console.print(f"the weights are those of step {step}, the best evaluation")
        held_out = 0 if self.evaluation is None else len(self.evaluation.prompts)
        save_results(self.console, self.settings, ppo, self.prompts, held_out, last)

    def _exports(self, ppo: PPO) -> dict[str, int]:
        """Return the bytes of the folders that are written at the end, by name."""
        settings = self.settings
        alone = settings.adapter_only or settings.quantization is not None
        exports = {"policy/": weights_bytes(ppo.policy.model, trained_only=alone)}
        if ppo.critic.trained and settings.save_critic != "none":
            whole = settings.save_critic == "whole"
            body = exports["policy/"] if whole and ppo.critic.reads_states else 0
            exports["critic/"] = body + weights_bytes(ppo.critic.module, trained_only=not whole)
        return exports


class ShownEvaluations(Callback):
    """Prints a line for each evaluation.

    Args:
        console: what is printed to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def on_evaluate(self, evaluated: Evaluated) -> None:
        metrics, count = evaluated.metrics, len(evaluated.rollout.prompts)
        when = f"after step {evaluated.step}" if evaluated.step else "before training"
        self._console.print(
            f"evaluation {when}: reward {metrics['reward']:+.3f} ± "
            f"{metrics['standard_error']:.3f}, {count} responses to held-out prompts",
            highlight=False,
            soft_wrap=True,
        )


def evaluations_table(evaluations: list[dict[str, float]]) -> Table:
    """Make a table of the first and the last evaluation of a run."""
    first, last = evaluations[0], evaluations[-1]
    table = Table(title="held-out prompts")
    table.add_column("metric")
    for one in (first, last):
        step = int(one["step"])
        table.add_column(f"step {step}" if step else "before", justify="right")
    for name in last:
        if name != "step":
            found = (f"{one[name]:.4g}" if name in one else "" for one in (first, last))
            table.add_row(plain(name), *found)
    return table


def _check_whole_critic(ppo: PPO) -> None:
    """Check, before anything is trained, that transformers has a class for the critic."""
    flag = "--save-critic: whole is not possible"
    if not ppo.critic.trained:
        raise ValueError(f"{flag}: the critic has no weights; leave the flag out")
    try:
        check_token_classifier(ppo)
    except ValueError as error:
        reason = str(error).removeprefix("critic: ").removesuffix("; use whole=False")
        raise ValueError(f"{flag}: {reason}; use --save-critic weights") from error
