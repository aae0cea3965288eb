"""The loop around PPO's steps: batches, evaluations, checkpoints, signals, callbacks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ppo_fast.checks import check_counts
from ppo_fast.config import PPOConfig
from ppo_fast.data.examples import Example, Stream
from ppo_fast.data.experience import Experience
from ppo_fast.data.rollout import Rollout
from ppo_fast.data.sampling import Sampling
from ppo_fast.data.step import Step
from ppo_fast.learning.learner import Learner
from ppo_fast.nonfinite import NotFiniteError
from ppo_fast.runs.callbacks import Callback, Callbacks, OnStep
from ppo_fast.runs.checkpoints import Checkpoints, Saves
from ppo_fast.runs.control import Control
from ppo_fast.runs.display import ProgressBar
from ppo_fast.runs.evaluation import Evaluable, Evaluation, Evaluator
from ppo_fast.runs.health import Health
from ppo_fast.runs.history import History
from ppo_fast.runs.progress import Progress
from ppo_fast.runs.prompts import counted_drops
from ppo_fast.runs.signals import Received, handled_signals
from ppo_fast.runs.time_limit import TimeLimit

logger = logging.getLogger(__name__)


class Trainable(Saves, Evaluable, Protocol):
    """Interface of PPO that the loop uses."""

    progress: Progress
    learner: Learner

    @property
    def config(self) -> PPOConfig: ...

    def make_experience(self, rollout: Rollout) -> Experience: ...

    def step(
        self,
        prompts: Any,
        *,
        num_epochs: int | None = None,
        max_length: int | None = None,
        temperature: float | None = None,
        more_prompts: Callable[[int], list[Example]] | None = None,
    ) -> Step: ...

    def plan_run(self, num_steps: int, num_epochs: int | None) -> None: ...


def train(
    ppo: Trainable,
    prompts: Any,
    *,
    num_steps: int,
    batch_size: int,
    num_epochs: int | None = None,
    max_length: int | None = None,
    temperature: float | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_freq: int = 10,
    keep_last: int | None = None,
    max_time: float | None = None,
    progress: bool = True,
    on_step: OnStep | None = None,
    callbacks: Sequence[Callback] | None = (),
    evaluation: Evaluation | None = None,
    control: str | Path | None = None,
) -> dict[str, Any]:
    """Run ``num_steps`` steps on batches drawn from ``prompts``; see ``PPO.train``."""
    check_counts(
        num_steps=num_steps,
        batch_size=batch_size,
        checkpoint_freq=checkpoint_freq,
        num_epochs=1 if num_epochs is None else num_epochs,
        keep_last=1 if keep_last is None else keep_last,
    )
    limit = TimeLimit(max_time)
    Sampling(1, 1.0 if temperature is None else temperature)  # Sampling checks the temperature
    changes = Control(control, ppo.learner)
    ppo.plan_run(num_steps, num_epochs)
    told = Callbacks([*Callbacks(callbacks).all, _health(evaluation)], on_step)
    prompts = ppo.check_prompts(prompts, max_length)
    ppo.progress.note_data(prompts)
    evaluator = Evaluator(ppo, evaluation, max_length, temperature)
    checkpoints = Checkpoints(
        ppo, checkpoint_dir, keep_last, best=lambda: evaluator.best, on_save=told.on_save
    )
    options = {"num_epochs": num_epochs, "max_length": max_length, "temperature": temperature}
    settings = asdict(ppo.config) | {k: v for k, v in options.items() if v is not None}
    history = History()
    with (
        checkpoints,
        counted_drops(prompts),
        handled_signals() as signals,
        ProgressBar(num_steps, shown=progress) as bar,
        _ended(told, history, ppo.progress, checkpoints),
    ):
        told.on_start(settings | {"batch_size": batch_size}, ppo.progress.steps)
        evaluate = partial(_evaluate, evaluator, checkpoints, told, limit)
        evaluate()
        for number in range(1, num_steps + 1):
            last = number == num_steps
            history.stopped_by = _reason(signals, limit, evaluator, last=last)
            if history.stopped_by is not None:
                break
            limit.begin_step()
            step = _step(ppo, prompts, batch_size, checkpoints, **options)
            history.note(step)
            bar.advance(step.metrics)
            with _kept(checkpoints, "an error in a callback"):
                told.on_step(step)
            # a signal leaves little time: first the checkpoint
            evaluated = signals.stop is None and evaluate(last=last)
            with _kept(checkpoints, "an error in the control file"):
                asked = changes.apply(step.number)
            due = step.number % checkpoint_freq == 0 or last
            due = due or (evaluated and step.number in evaluator.best)
            if (signals.take_save() or asked or due) and checkpoints.save():
                changes.forget()
            limit.step_done()
        else:
            history.stopped_by = None if signals.stop is None else signals.stop.name
        if history.stopped_by is not None:
            ctrl_c = history.stopped_by == "SIGINT"
            checkpoints.keep("Ctrl-C" if ctrl_c else history.stopped_by)
    return history.result(ppo.progress)


def _health(evaluation: Evaluation | None) -> Health:
    if not isinstance(evaluation, Evaluation):  # Evaluator checks its type
        return Health()
    return Health(evaluation.best, lower_is_better=evaluation.lower_is_better)


def _reason(signals: Received, limit: TimeLimit, evaluator: Evaluator, *, last: bool) -> str | None:
    """Return why a run ends before its next step; None: it goes on."""
    if signals.stop is not None:
        return signals.stop.name
    if not limit.fits(evaluates=evaluator.due(last=last, ahead=1)):
        return "max_time"
    return "patience" if evaluator.exhausted else None


def _evaluate(
    evaluator: Evaluator,
    checkpoints: Checkpoints,
    told: Callbacks,
    limit: TimeLimit,
    *,
    last: bool = False,
) -> bool:
    """Evaluate if it is due, and say whether it was."""
    if not evaluator.due(last=last):
        return False
    with limit.evaluation(), _kept(checkpoints, "an error in an evaluation"):
        told.on_evaluate(evaluator.run())
    return True


@contextmanager
def _kept(checkpoints: Checkpoints, what: str) -> Iterator[None]:
    """If the block raises an error, write a checkpoint before it goes on."""
    try:
        yield
    except (Exception, SystemExit):
        checkpoints.keep(what)
        raise


@contextmanager
def _ended(
    told: Callbacks, history: History, progress: Progress, checkpoints: Checkpoints
) -> Iterator[None]:
    """After the block, tell the callbacks of the end; a last checkpoint that failed is an error."""
    try:
        yield
        if checkpoints.failed is not None:
            raise checkpoints.failed
    except BaseException:
        told.on_end(None)
        raise
    told.on_end(history.result(progress))


def pretrain_critic(
    ppo: Trainable, prompts: Any, num_steps: int, batch_size: int
) -> list[dict[str, float]]:
    """Train the value function alone; see ``PPO.pretrain_critic``."""
    check_counts(num_steps=num_steps, batch_size=batch_size)
    if "value" not in ppo.learner.optimizers:
        raise ValueError(
            "pretrain_critic: the trainer has no value function; pass a value_model or "
            "config=PPOConfig(critic='head')"
        )
    prompts, drawn, found = ppo.check_prompts(prompts), Progress(ppo.config.seed), []
    for number in range(num_steps):
        batch = drawn.next_prompts(prompts, batch_size)
        experience = ppo.make_experience(ppo.rollout(batch, scorer=ppo.scorer))
        metrics = ppo.learner.train_critic(
            experience,
            epochs=ppo.config.value_epochs or ppo.config.num_epochs,
            seed=drawn.seed_of("pretraining", number),
        )
        found.append(experience.metrics | metrics)
    return found


def _step(
    ppo: Trainable,
    prompts: list[Example] | Stream,
    batch_size: int,
    checkpoints: Checkpoints,
    **options: Any,
) -> Step:
    """Run the next step. If it fails, the next call repeats it, with the same prompts and draws.

    With ``on_nonfinite="skip"``, a step in which a number is not finite is given up for one with
    the next prompts.
    """
    before = ppo.progress.prompts_drawn, ppo.progress.sequences_sampled
    more_prompts = partial(ppo.progress.next_prompts, prompts)
    skipped = 0
    try:
        while True:
            try:
                return ppo.step(more_prompts(batch_size), more_prompts=more_prompts, **options)
            except NotFiniteError as error:
                skips = ppo.config.on_nonfinite == "skip" and not ppo.amid_update
                if not skips or skipped >= ppo.config.max_skipped:
                    raise
                skipped += 1
                logger.warning("%s; these prompts are left out (on_nonfinite='skip')", error)
    except BaseException as error:
        ppo.progress.prompts_drawn, ppo.progress.sequences_sampled = before
        if isinstance(error, Exception):
            checkpoints.keep("an error")
        raise
