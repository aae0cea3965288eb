"""Running: what PPO offers around its steps: whole runs, checkpoints, checks and plans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ppo_fast.checkpointing.checkpoint import (
    checkpoint_path,
    folder_path,
    read_checkpoint,
    write_checkpoint,
)
from ppo_fast.checkpointing.contents import check_finite
from ppo_fast.checkpointing.kept import checkpoints_in
from ppo_fast.checkpointing.settings import settle_settings
from ppo_fast.checkpointing.space import check_space, checkpoint_bytes
from ppo_fast.checks import check_counts
from ppo_fast.config import PPOConfig
from ppo_fast.critics.critic import Critic, ModelCritic
from ppo_fast.data.examples import Example, Prompt, Stream
from ppo_fast.diagnostics.memory_plan import MemoryPlan, plan_memory
from ppo_fast.learning.learner import Learner
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.rewards.scorer import Scorer
from ppo_fast.rollout.sampler import Sampler
from ppo_fast.rollout.texts import Texts
from ppo_fast.runs import loop
from ppo_fast.runs.callbacks import Callback, Callbacks, OnStep
from ppo_fast.runs.evaluation import Evaluation
from ppo_fast.runs.progress import Progress
from ppo_fast.runs.prompts import check_run_prompts
from ppo_fast.trackers.report_to import Trackers

Prompts = Iterable[Prompt | Example | Mapping[str, Any]]


class Running:
    """Base of PPO with all that is around the algorithm. ``PPO`` describes its attributes."""

    device: torch.device
    policy: LanguageModel
    reference: LanguageModel
    critic: Critic
    texts: Texts
    sampler: Sampler
    scorer: Scorer
    learner: Learner
    progress: Progress
    newest_checkpoint: Path | None
    _config: PPOConfig
    _space_checked: Path | None = None

    config = property(lambda self: self._config)

    def pretrain_critic(
        self, prompts: Prompts, num_steps: int, batch_size: int = 16
    ) -> list[dict[str, float]]:
        """Train the value function alone, on rollouts of the policy as it is.

        These are no steps: they change no counter, schedule or later draw of the training. Returns
        the metrics of each.

        Raises:
            ValueError: the critic has no value function to train.
        """
        ppo: Any = self  # PPO has the methods of the algorithm
        return loop.pretrain_critic(ppo, prompts, num_steps, batch_size)

    def train(
        self,
        prompts: Prompts | Stream,
        num_steps: int = 100,
        batch_size: int = 16,
        *,
        num_epochs: int | None = None,
        max_length: int | None = None,
        temperature: float | None = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_freq: int = 10,
        keep_last: int | None = None,
        max_time: float | None = None,
        evaluation: Evaluation | None = None,
        callbacks: Sequence[Callback] | None = (),
        report_to: str | Sequence[str] = (),
        metric_names: Literal["ppo_fast", "trl"] = "ppo_fast",
        control: str | Path | None = None,
        progress: bool = True,
        on_step: OnStep | None = None,
    ) -> dict[str, Any]:
        """Run ``num_steps`` steps of PPO on batches drawn from ``prompts``.

        Prompts come in random order, every one once before any comes again. Ctrl-C and SIGTERM let
        the current step finish, write a checkpoint if there is a ``checkpoint_dir``, and end the
        run; an error writes one too before it is raised. SIGUSR1 writes one after the step.

        Args:
            prompts: to draw from, as in ``rollout``; a datasets.Dataset, or one that is streamed,
                which is read in its own order.
            num_steps: steps to run, after those already done.
            batch_size: prompts per step; more than there are means all of them.
            num_epochs, max_length, temperature: as in ``step``.
            checkpoint_dir: where ``ppo_checkpoint_step_<step>.pt`` files go; None: nowhere.
            checkpoint_freq: steps between them; the last step gets one too.
            keep_last: number of checkpoints that are kept, the newest; None: all.
            max_time: seconds from now; after the first, no step begins that would end later. None:
                no limit.
            evaluation: held-out prompts, when they are evaluated, which checkpoints are kept for
                it, and whether the run ends early; None: nothing is evaluated.
            callbacks: objects that are told of steps, evaluations and checkpoints.
            report_to: names of trackers, "tensorboard", "wandb", "trackio", "mlflow" and others
                that accelerate has; ``ppo_fast.Trackers`` is a callback with more settings.
            metric_names: "trl": trackers get TRL's names of metrics (docs/metrics.md).
            control: path of a YAML file that is looked for after each step, for a new
                learning_rate, value_learning_rate or kl_penalty, or ``checkpoint: true``; None:
                nothing is looked for.
            progress: show a progress bar on a terminal.
            on_step: called with the Step after every step.

        Returns:
            training_history (policy_losses, value_losses, kl_divergences, mean_rewards,
                step_avg_rewards (their running mean): one entry per step), final_stats (averages
                and running totals), final_avg_reward, final_kl_divergence (of the last step),
                interrupted (before its end), stopped_by ("SIGINT", "SIGTERM", "max_time",
                "patience" or None), evaluations (the metrics of each, and its step).
        """
        check_counts(
            num_steps=num_steps,
            checkpoint_freq=checkpoint_freq,
            keep_last=1 if keep_last is None else keep_last,
        )
        if checkpoint_dir is not None and self._space_checked != folder_path(checkpoint_dir):
            self.check_space(
                checkpoint_dir,
                num_steps=self.progress.steps + num_steps,
                checkpoint_freq=checkpoint_freq,
                keep_last=keep_last,
                keep_best=evaluation.keep_best if isinstance(evaluation, Evaluation) else 0,
            )
        told = [*Callbacks(callbacks).all]
        if report_to:
            told.append(Trackers(report_to, metric_names=metric_names, folder=checkpoint_dir))
        ppo: Any = self  # PPO has the methods of the algorithm
        return loop.train(
            ppo,
            prompts,
            num_steps=num_steps,
            batch_size=batch_size,
            num_epochs=num_epochs,
            max_length=max_length,
            temperature=temperature,
            checkpoint_dir=checkpoint_dir,
            checkpoint_freq=checkpoint_freq,
            keep_last=keep_last,
            max_time=max_time,
            evaluation=evaluation,
            callbacks=told,
            control=control,
            progress=progress,
            on_step=on_step,
        )

    # Checkpoints

    def save_checkpoint(self, checkpoint_dir: str | Path, step: int) -> Path:
        """Write ``ppo_checkpoint_step_<step>.pt`` in ``checkpoint_dir``, whole or not at all.

        The file holds the trained weights of policy and critic, their optimizers, the counters and
        all random states, for ``load_checkpoint``. Of frozen weights it holds a fingerprint.

        Raises:
            NotFiniteError: weights, moments or the outputs for a few tokens are not finite.
            OSError: it cannot be written.
        """
        path = checkpoint_path(checkpoint_dir, step)
        modules = self._trained_modules()
        check_finite(modules, self.learner.optimizers)
        self.learner.guard.check_outputs()
        write_checkpoint(
            path,
            step,
            modules=modules,
            optimizers=self.learner.optimizers,
            reference=self.reference.model,
            progress=self.progress.state_dict() | {"learner": self.learner.state_dict()},
            config=asdict(self.config),
        )
        self.newest_checkpoint = path.resolve()
        return path

    def load_checkpoint(self, checkpoint_path: str | Path) -> int:
        """Restore what ``save_checkpoint`` wrote, and return its step.

        Nothing in the file is executed. Raises FileNotFoundError or ValueError, and changes
        nothing, if there is no file, or it is truncated, not ours or of another model.
        """
        path = Path(checkpoint_path)
        contents = read_checkpoint(
            path,
            modules=self._trained_modules(),
            optimizers=self.learner.optimizers,
            reference=self.reference.model,
            seed=self.config.seed,
        )
        self.progress.load_state_dict(contents)
        self.learner.load_state_dict(settle_settings(contents, asdict(self.config)))
        self.learner.amid_update, self.newest_checkpoint = False, path.resolve()
        return contents["step"]

    amid_update = property(lambda self: self.learner.amid_update)

    def _trained_modules(self) -> dict[str, nn.Module]:
        modules = {"policy": self.policy.model, "value": self.critic.module}
        return {name: modules[name] for name in self.learner.optimizers}

    # Checks and construction

    def check_prompts(
        self,
        prompts: Prompts | Stream,
        max_length: int | None = None,
        *,
        scorer: Scorer | None = None,
    ) -> list[Example] | Stream:
        """Check all prompts, and what rewards take of their rows, before the first step.

        Returns them as examples, without those that ``long_prompts="drop"`` drops. Of a stream,
        the first is checked now, and the others when they are read. ``scorer``: of the rewards
        that will judge the responses; None: the trainer's.
        """
        length = self.config.max_length if max_length is None else max_length
        scorer = scorer or self.scorer
        check_columns = partial(self._check_columns, scorer=scorer)
        return check_run_prompts(
            prompts, self.texts, scorer, check_columns, length, self._readers()
        )

    def _check_columns(self, columns: set[str], scorer: Scorer | None = None) -> None:
        (scorer or self.scorer).check_columns(columns)
        self.sampler.check_columns(columns)

    def plan_run(self, num_steps: int, num_epochs: int | None = None) -> None:
        """Tell the schedules that ``num_steps`` more steps will follow; ``train`` does it.

        Raises:
            ValueError: a schedule or the critic's warm-up is longer than the run.
        """
        total = self.progress.steps + num_steps
        self.learner.schedule.plan(total, self._epochs(num_epochs))

    def check_space(
        self,
        checkpoint_dir: str | Path,
        *,
        num_steps: int,
        checkpoint_freq: int,
        keep_last: int | None = None,
        keep_best: int = 0,
        exports: Mapping[str, int] | None = None,
        name: str = "checkpoint_dir",
    ) -> None:
        """Check that what a run will write fits on the disk; ``train`` does it.

        Args:
            checkpoint_dir, checkpoint_freq, keep_last: as in ``train``.
            keep_best: as in ``Evaluation``.
            num_steps: of the whole run.
            exports: bytes of what is written after it, by name.
            name: of the folder, for messages.

        Raises:
            ValueError: it does not fit. Where only some of the checkpoints do, it is logged.
        """
        folder = folder_path(checkpoint_dir)
        check_space(
            folder,
            checkpoint_bytes(self._trained_modules(), self.learner.optimizers),
            exports or {},
            num_steps=num_steps,
            checkpoint_freq=checkpoint_freq,
            keep_last=keep_last,
            keep_best=keep_best,
            name=name,
            done=self.progress.steps,
            existing=len(checkpoints_in(folder)),
        )
        self._space_checked = folder

    def memory_plan(self, batch_size: int, prompt_length: int) -> MemoryPlan:
        """Plan the memory of steps of ``batch_size`` prompts of ``prompt_length`` tokens."""
        return plan_memory(
            self.policy.model.config,
            self.config,
            batch_size=batch_size,
            prompt_length=prompt_length,
            value_model=self.critic.module if isinstance(self.critic, ModelCritic) else None,
            policy_model=self.policy.model,
            device=self.device.type,
            reward_bytes=self.scorer.nbytes(),
        )

    def _readers(self) -> dict[str, Any]:
        """Return the models besides the policy that read its sequences."""
        rewards = self.scorer.modules
        names = {k: "reward_model" if len(rewards) == 1 else f"reward_model {k}" for k in rewards}
        return {"value_model": self.critic.module, **{names[k]: m for k, m in rewards.items()}}

    def _epochs(self, num_epochs: int | None) -> int:
        epochs = self.config.num_epochs if num_epochs is None else num_epochs
        check_counts(num_epochs=epochs)
        return epochs
