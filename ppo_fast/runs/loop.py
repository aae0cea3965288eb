"""The loop around PPO's steps: batches, history, checkpoints, Ctrl-C."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
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
from ppo_fast.runs.checkpoint import checkpoint_path, make_folder
from ppo_fast.runs.display import ProgressBar
from ppo_fast.runs.files import remove_partial
from ppo_fast.runs.health import Health
from ppo_fast.runs.kept import remove_old
from ppo_fast.runs.lock import FolderLock
from ppo_fast.runs.progress import LISTS, Progress
from ppo_fast.runs.prompts import counted_drops
from ppo_fast.runs.signals import handled_signals
from ppo_fast.runs.time_limit import TimeLimit

logger = logging.getLogger(__name__)

OnStep = Callable[[Step], None]

HISTORY = ("policy_losses", "value_losses", "kl_divergences", "mean_rewards")


class Trainable(Protocol):
    """Interface of PPO that the loop uses."""

    progress: Progress
    learner: Learner
    newest_checkpoint: Path | None

    @property
    def config(self) -> PPOConfig: ...

    @property
    def amid_update(self) -> bool:
        """Whether an update was broken off, so that the weights are those of no whole step."""
        ...

    def check_prompts(
        self, prompts: Any, max_length: int | None = None
    ) -> list[Example] | Stream: ...

    def rollout(self, prompts: Any) -> Rollout: ...

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

    def save_checkpoint(self, checkpoint_dir: str | Path, step: int) -> Path: ...


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
    ppo.plan_run(num_steps, num_epochs)
    prompts = ppo.check_prompts(prompts, max_length)
    if checkpoint_dir is not None:
        make_folder(checkpoint_dir)
    history: dict[str, list[float]] = {name: [] for name in (*HISTORY, "step_avg_rewards")}
    health, stopped_by = Health(), None
    failed: OSError | None = None
    with (
        nullcontext() if checkpoint_dir is None else _own_folder(Path(checkpoint_dir)),
        counted_drops(prompts),
        handled_signals() as signals,
        ProgressBar(num_steps, shown=progress) as bar,
    ):
        for _ in range(num_steps):
            step = _step(
                ppo,
                prompts,
                batch_size,
                checkpoint_dir,
                num_epochs=num_epochs,
                max_length=max_length,
                temperature=temperature,
            )
            _note(history, step)
            health.note(step.metrics)
            bar.advance(step.metrics)
            if on_step is not None:
                try:
                    on_step(step)
                except (Exception, SystemExit):  # of any type; it is raised again
                    _keep(ppo, checkpoint_dir, "an error in on_step")
                    raise
            due = step.number % checkpoint_freq == 0 or signals.take_save()
            if checkpoint_dir is not None and due:
                failed = _save(ppo, Path(checkpoint_dir), step.number, keep_last)
            limit.step_done()
            if signals.stop is not None:
                stopped_by = signals.stop.name
            elif limit.reached:
                stopped_by = "max_time"
            if stopped_by is not None:
                _keep(ppo, checkpoint_dir, "Ctrl-C" if stopped_by == "SIGINT" else stopped_by)
                break
    if failed is not None:
        raise failed
    statistics = ppo.progress.statistics()
    return {
        "training_history": history,
        "final_stats": statistics,
        "final_avg_reward": statistics["avg_reward"],
        "final_kl_divergence": history["kl_divergences"][-1],
        "interrupted": stopped_by is not None,
        "stopped_by": stopped_by,
    }


def _save(ppo: Trainable, folder: Path, step: int, keep_last: int | None) -> OSError | None:
    """Write a checkpoint. If the disk is full or gone, warn and return the error: a run goes on."""
    try:
        ppo.save_checkpoint(folder, step)
        remove_old(folder, step, keep_last)
    except OSError as error:
        logger.warning("%s; the run goes on, and tries again at the next checkpoint", error)
        return error
    return None


def _own_folder(folder: Path) -> FolderLock:
    """Lock the folder of the checkpoints, and remove what killed runs left half written there."""
    lock = FolderLock(folder, "checkpoint_dir")
    remove_partial(folder)
    return lock


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
        experience = ppo.make_experience(ppo.rollout(drawn.next_prompts(prompts, batch_size)))
        metrics = ppo.learner.train_critic(
            experience,
            epochs=ppo.config.value_epochs or ppo.config.num_epochs,
            seed=drawn.seed_of("pretraining", number),
        )
        found.append(experience.metrics | metrics)
    return found


def _note(history: dict[str, list[float]], step: Step) -> None:
    for name in HISTORY:
        history[name].append(step.metrics[LISTS[name]])
    rewards = history["mean_rewards"]
    history["step_avg_rewards"].append(sum(rewards) / len(rewards))


def _step(
    ppo: Trainable,
    prompts: list[Example] | Stream,
    batch_size: int,
    checkpoint_dir: str | Path | None,
    **options: Any,
) -> Step:
    """Run the next step. If it fails, the next call repeats it, with the same prompts and draws."""
    drawn, sampled = ppo.progress.prompts_drawn, ppo.progress.sequences_sampled
    try:
        more_prompts = partial(ppo.progress.next_prompts, prompts)
        batch = more_prompts(batch_size)
        return ppo.step(batch, more_prompts=more_prompts, **options)
    except BaseException as error:
        ppo.progress.prompts_drawn, ppo.progress.sequences_sampled = drawn, sampled
        if isinstance(error, Exception):
            _keep(ppo, checkpoint_dir, "an error")
        raise


def _keep(ppo: Trainable, checkpoint_dir: str | Path | None, why: str) -> None:
    """Write a checkpoint of what was trained so far, if possible, and log where it is."""
    step = ppo.progress.steps
    if step == 0:
        return  # there is nothing to keep, and the error says the rest
    where = "no checkpoint_dir was given; the weights are in the policy"
    if checkpoint_dir is not None:
        path = checkpoint_path(checkpoint_dir, step)
        where = f"checkpoint {path}"
        if ppo.amid_update:
            # these weights are of no step: a run resumed from them would not be the same
            where = (
                f"during the update of the next step; newest checkpoint: {ppo.newest_checkpoint}"
            )
        elif path.resolve() != ppo.newest_checkpoint:
            try:
                ppo.save_checkpoint(checkpoint_dir, step)
            except (OSError, FloatingPointError) as error:  # it must not hide why the run ends
                where = f"{error}; newest checkpoint: {ppo.newest_checkpoint}"
    logger.warning("stopped by %s after step %d: %s", why, step, where)
