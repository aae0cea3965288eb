"""The loop around PPOTrainer's steps: batches, history, checkpoints, Ctrl-C."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ppo_fast import checks
from ppo_fast.config import PPOConfig
from ppo_fast.critics.critic import Critic
from ppo_fast.rollout import Rollout, Sampling
from ppo_fast.runs import checkpoint
from ppo_fast.runs.interrupt import finish_step_on_interrupt

OnStep = Callable[[dict[str, float]], None]

# running totals of stats, and the metric that each adds up
TOTALS = {
    "total_reward": "mean_reward",
    "total_kl_divergence": "kl_divergence",
    "total_policy_loss": "policy_loss",
    "total_value_loss": "value_loss",
}
HISTORY = {
    "policy_losses": "policy_loss",
    "value_losses": "value_loss",
    "kl_divergences": "kl_divergence",
    "mean_rewards": "mean_reward",
}


class TrainingLoop:
    """``train``, checkpoints and statistics of a PPOTrainer.

    All that is random comes from the config's seed and three counters (steps, prompts drawn,
    sequences sampled), which checkpoints hold: a resumed run goes on as if it had never stopped.
    """

    stats: dict[str, float]
    # what PPOTrainer has
    config: PPOConfig
    tokenizer: PreTrainedTokenizerBase
    policy_model: nn.Module
    reference_model: nn.Module
    critic: Critic | None
    policy_optimizer: Optimizer
    value_optimizer: Optimizer | None
    train_step: Callable[..., dict[str, float]]

    def _init_counters(self) -> None:
        self.stats = {"total_steps": 0} | dict.fromkeys(TOTALS, 0.0)
        self._prompts_drawn = 0
        self._sequences_sampled = 0
        self._newest_checkpoint: Path | None = None
        self._amid_update = False
        self.last_rollout: Rollout | None = None
        self.last_scores: Tensor | None = None

    def train(
        self,
        prompts: Sequence[str],
        num_steps: int = 100,
        batch_size: int = 4,
        num_epochs_per_batch: int | None = None,
        max_length: int | None = None,
        temperature: float | None = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_freq: int = 10,
        *,
        progress: bool = True,
        on_step: OnStep | None = None,
    ) -> dict[str, Any]:
        """Run ``num_steps`` steps of PPO on batches drawn from ``prompts``.

        Prompts come in random order, every one once before any comes again. Ctrl-C lets the step
        in hand finish, writes a checkpoint if there is a ``checkpoint_dir``, and returns; an error
        writes one too before it is raised.

        Args:
            prompts: the texts to draw from.
            num_steps: steps to run, after those already done.
            batch_size: prompts a step; more than there are means all of them.
            num_epochs_per_batch, max_length, temperature: as in ``train_step``.
            checkpoint_dir: where ``ppo_checkpoint_step_<step>.pt`` files go; None: nowhere.
            checkpoint_freq: steps between them.
            progress: show a progress bar.
            on_step: called with the metrics after every step.

        Returns:
            training_history (policy_losses, value_losses, kl_divergences, mean_rewards,
            step_avg_rewards (their running mean): one entry a step), final_stats
            (``get_statistics()`` and the running totals), final_avg_reward,
            final_kl_divergence (of the last step), interrupted.
        """
        checks.check_counts(
            num_steps=num_steps,
            batch_size=batch_size,
            checkpoint_freq=checkpoint_freq,
            num_epochs_per_batch=1 if num_epochs_per_batch is None else num_epochs_per_batch,
        )
        Sampling(1, self.config.temperature if temperature is None else temperature)
        prompts = self._check_training(prompts, max_length)
        if checkpoint_dir is not None:
            checkpoint.make_folder(checkpoint_dir)
        history: dict[str, list[float]] = {name: [] for name in (*HISTORY, "step_avg_rewards")}
        stopped = False
        with (
            finish_step_on_interrupt() as interrupted,
            tqdm(total=num_steps, desc="PPO", disable=not progress) as bar,
        ):
            for _ in range(num_steps):
                drawn, sampled = self._prompts_drawn, self._sequences_sampled
                try:
                    batch = self._next_prompts(prompts, batch_size)
                    metrics = self.train_step(batch, num_epochs_per_batch, max_length, temperature)
                except BaseException as error:
                    # going on repeats this step, with the same prompts and draws
                    self._prompts_drawn, self._sequences_sampled = drawn, sampled
                    if isinstance(error, Exception):
                        self._keep(checkpoint_dir, "an error")
                    raise
                for name, metric in HISTORY.items():
                    history[name].append(metrics[metric])
                rewards = history["mean_rewards"]
                history["step_avg_rewards"].append(sum(rewards) / len(rewards))
                bar.set_postfix(reward=metrics["mean_reward"], kl=metrics["kl_divergence"])
                bar.update()
                if on_step is not None:
                    try:
                        on_step(metrics)
                    except Exception:  # whatever it is, it is raised again
                        self._keep(checkpoint_dir, "an error in on_step")
                        raise
                step = int(self.stats["total_steps"])
                if checkpoint_dir is not None and step % checkpoint_freq == 0:
                    self.save_checkpoint(checkpoint_dir, step)
                if stopped := interrupted():
                    self._keep(checkpoint_dir, "Ctrl-C")
                    break
        return {
            "training_history": history,
            "final_stats": self.stats | self.get_statistics(),
            "final_avg_reward": self.get_statistics()["avg_reward"],
            "final_kl_divergence": history["kl_divergences"][-1],
            "interrupted": stopped,
        }

    def save_checkpoint(self, checkpoint_dir: str | Path, step: int) -> Path:
        """Write ``ppo_checkpoint_step_<step>.pt`` in ``checkpoint_dir``, whole or not at all.

        One file with the trained weights of the policy and of the value function, both optimizers,
        the statistics and all that is random, which ``load_checkpoint`` reads. Of frozen weights it
        holds a fingerprint.
        """
        path = self._checkpoint_path(checkpoint_dir, step)
        parts = self._checkpoint_parts()
        checkpoint.save(
            {
                "step": step,
                "identity": {name: checkpoint.identity(m) for name, m in parts.items()},
                "reference": checkpoint.fingerprint(self.reference_model),
                "frozen": {n: checkpoint.frozen_fingerprint(m) for n, m in parts.items()},
                "models": {name: checkpoint.trained_state(m) for name, m in parts.items()},
                "optimizers": {n: o.state_dict() for n, o in self._optimizers().items()},
                "stats": dict(self.stats),
                "seed": self.config.seed,
                "prompts_drawn": self._prompts_drawn,
                "sequences_sampled": self._sequences_sampled,
                "random_states": checkpoint.random_states(),
            },
            path,
        )
        self._newest_checkpoint = path.resolve()
        return path

    def load_checkpoint(self, checkpoint_path: str | Path) -> int:
        """Restore what ``save_checkpoint`` wrote, and return its step. Nothing in the file is
        executed, and nothing is changed when it does not fit.

        Raises:
            FileNotFoundError, ValueError: no file; truncated, not ours, or of another model.
        """
        path = Path(checkpoint_path)
        payload = checkpoint.load(path)
        parts = self._checkpoint_parts()
        if payload["models"].keys() != parts.keys():
            raise ValueError(
                f"checkpoint: {path} holds {sorted(payload['models'])}, the trainer has "
                f"{sorted(parts)}; construct it with the same critic"
            )
        for name, module in parts.items():
            checkpoint.check_identity(name, payload["identity"][name], module, path)
        for name, optimizer in self._optimizers().items():
            checkpoint.check_optimizer(name, payload["optimizers"][name], optimizer, path)
        for name, module in parts.items():
            checkpoint.check_frozen(name, payload["frozen"][name], module, path)
        if payload["reference"] != checkpoint.fingerprint(self.reference_model):
            print(
                f"warning: {path} was trained against another reference model; construct the "
                "trainer with the policy that training started from, else the KL is measured "
                "to the wrong model",
                file=sys.stderr,
            )
        if payload["seed"] != self.config.seed:
            print(
                f"warning: {path} was trained with seed {payload['seed']}, the trainer's is "
                f"{self.config.seed}: prompts and draws will not be those of a run without a stop",
                file=sys.stderr,
            )
        for name, module in parts.items():
            checkpoint.load_trained_state(module, payload["models"][name])
        for name, optimizer in self._optimizers().items():
            checkpoint.restore_optimizer(optimizer, payload["optimizers"][name])
        self._amid_update = False
        self.stats = payload["stats"]
        self._prompts_drawn = payload["prompts_drawn"]
        self._sequences_sampled = payload["sequences_sampled"]
        self._newest_checkpoint = path.resolve()
        checkpoint.restore_random_states(payload["random_states"])
        return payload["step"]

    def get_statistics(self) -> dict[str, float]:
        """total_steps, and avg_reward, avg_kl_divergence, avg_policy_loss, avg_value_loss over all
        steps so far."""
        steps = self.stats["total_steps"]
        averages = {name: self.stats[name] / max(steps, 1) for name in TOTALS}
        return {"total_steps": steps} | {
            name.replace("total_", "avg_"): value for name, value in averages.items()
        }

    def _count_step(self, metrics: dict[str, float]) -> None:
        self._amid_update = False
        self.stats["total_steps"] += 1
        for name, metric in TOTALS.items():
            self.stats[name] += metrics[metric]

    def _check_training(self, prompts: Sequence[str], max_length: int | None) -> list[str]:
        """All prompts, checked before the first step rather than when a batch meets a bad one."""
        prompts = checks.check_prompts(prompts)
        length = self.config.max_length if max_length is None else max_length
        checks.check_counts(max_length=length)
        checks.check_prompt_ids(
            prompts,
            self.tokenizer(prompts)["input_ids"],
            length,
            checks.context_limit(self.policy_model),
        )
        return prompts

    def _next_prompts(self, prompts: list[str], batch_size: int) -> list[str]:
        """The next batch from an endless row of random permutations of the prompts."""
        size = min(batch_size, len(prompts))
        batch: list[str] = []
        while len(batch) < size:
            round_, first = divmod(self._prompts_drawn + len(batch), len(prompts))
            generator = torch.Generator().manual_seed(self._seed_of("prompts", round_))
            order = torch.randperm(len(prompts), generator=generator, device="cpu")
            batch += [prompts[j] for j in order[first : first + size - len(batch)].tolist()]
        self._prompts_drawn += len(batch)
        return batch

    def _seed_of(self, what: str, number: int) -> int:
        """A seed for torch's CPU generator, which reads no more than 32 bits of it."""
        return random.Random(f"{what} {self.config.seed} {number}").getrandbits(32)

    def _next_seeds(self, count: int) -> Tensor:
        """Seeds [count] int64 of the next sequences: the config's seed and a running number."""
        first = (self.config.seed << 32) + self._sequences_sampled
        self._sequences_sampled += count
        return torch.arange(first, first + count, device="cpu")

    @staticmethod
    def _checkpoint_path(checkpoint_dir: str | Path, step: int) -> Path:
        return Path(checkpoint_dir) / f"ppo_checkpoint_step_{step}.pt"

    def _checkpoint_parts(self) -> dict[str, torch.nn.Module]:
        parts = {"policy": self.policy_model}
        return parts if self.critic is None else parts | {"value": self.critic.module}

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        optimizers = {"policy": self.policy_optimizer, "value": self.value_optimizer}
        return {name: o for name, o in optimizers.items() if o is not None}

    def _keep(self, checkpoint_dir: str | Path | None, why: str) -> None:
        """Write what was trained so far, and say where."""
        step = int(self.stats["total_steps"])
        where = "no checkpoint_dir was given; the weights are in trainer.policy_model"
        if checkpoint_dir is not None and step > 0:
            path = self._checkpoint_path(checkpoint_dir, step)
            where = f"checkpoint {path}"
            if self._amid_update:
                # these weights are of no step: a run resumed from them would not be the same
                where = f"amid its update; the newest checkpoint is {self._newest_checkpoint}"
            elif path.resolve() != self._newest_checkpoint:
                self.save_checkpoint(checkpoint_dir, step)
        tqdm.write(f"stopped by {why} after step {step}: {where}", file=sys.stderr)
