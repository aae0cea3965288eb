"""PPOTrainer: PPO with the constructor and the method names of the classic interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from ppo_fast.checks import check_counts, with_names_checked
from ppo_fast.classic_methods import ClassicMethods
from ppo_fast.config import PPOConfig
from ppo_fast.data.examples import Example, Stream
from ppo_fast.data.experience import Experience
from ppo_fast.data.rollout import Rollout
from ppo_fast.data.step import Step
from ppo_fast.models.checks import to_device
from ppo_fast.models.setup import make_reference
from ppo_fast.parts import placed_scorer
from ppo_fast.ppo import Prompts, Reward
from ppo_fast.rewards.scorer import Scorer
from ppo_fast.rollout import Engine
from ppo_fast.rollout.sampler import MakeEnvironment
from ppo_fast.runs.callbacks import Callback, OnStep
from ppo_fast.runs.evaluation import Evaluation


class PPOTrainer(ClassicMethods):
    """Trains a causal language model by PPO against a reward: the classic interface.

    Tensors [B, T] that its methods return are 0 beyond a response. A prompt and response from the
    last ``generate_responses`` (or ``rollout``) stand for the tokens that were sampled, and their
    log-probs are at its temperature unless another is given. Other responses are encoded without
    special tokens and get no EOS.

    Args:
        policy_model: the transformers causal LM that is trained. It is moved to ``device``, its
            dropout is switched off and weights stored in half precision become float32.
        value_model: a module ``forward(input_ids, attention_mask)`` that gives one value per token
            [B, L] (``ppo_fast.ValueModel``) or per sequence [B]; None for the critics without one.
        reward_model: a module that gives one score per sequence (``ppo_fast.RewardModel``, a
            transformers classifier with one label, your own), or a function ``f(prompts,
            completions) -> list[float]``.
        tokenizer: the policy's, with a pad token.
        device: where everything runs. Models on the CPU are moved there.
        learning_rate: AdamW's, 1e-5.
        clip_epsilon: the ratio's clip range, 0.2.
        kl_penalty: coefficient of the KL to the reference, 0.1.
        gamma: discount, 0.99.
        gae_lambda: GAE's lambda, 0.95.
        value_loss_coef: weight of the value loss, 0.5.
        max_grad_norm: largest gradient norm, 1.0.
        config: every other setting; ``PPOConfig()`` has what works for language models. The
            arguments above, where given, override it; without a config, the defaults above hold
            (``PPOConfig.spec()``).
        engine: samples responses (``ppo_fast.rollout``); None: the policy does, in this process.
        reference_model: the model that the KL is measured to, of the policy's vocabulary; None: the
            policy as it is at construction.
        environment: makes an object that replies within responses; see ``PPO``.
        reward_device: where reward models run; see ``PPO``.

    Attributes:
        policy_model, value_model, reward_model, tokenizer, device: as given.
        reference_model: the frozen model that the KL is measured to; may be set to another one.
        policy_optimizer, value_optimizer: the learner's optimizers; value_optimizer is None where
            no value function is trained.
        stats: total_steps, and policy_losses, value_losses, kl_divergences, mean_rewards and
            mean_advantages, lists with a number for each step.
        last_rollout: the last rollout, without states and trunk states, or None.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which and how to mend it.
    """

    @with_names_checked
    def __init__(
        self,
        policy_model: nn.Module,
        value_model: nn.Module | None,
        reward_model: Reward,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device | str,
        learning_rate: float | None = None,
        clip_epsilon: float | None = None,
        kl_penalty: float | None = None,
        gamma: float | None = None,
        gae_lambda: float | None = None,
        value_loss_coef: float | None = None,
        max_grad_norm: float | None = None,
        *,
        config: PPOConfig | None = None,
        engine: Engine | None = None,
        reference_model: nn.Module | None = None,
        environment: MakeEnvironment | None = None,
        reward_device: torch.device | str | None = None,
    ) -> None:
        if config is not None and not isinstance(config, PPOConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected a PPOConfig(...)")
        given = {
            "learning_rate": learning_rate,
            "clip_epsilon": clip_epsilon,
            "kl_penalty": kl_penalty,
            "gamma": gamma,
            "gae_lambda": gae_lambda,
            "value_loss_coef": value_loss_coef,
            "max_grad_norm": max_grad_norm,
        }
        given = {name: value for name, value in given.items() if value is not None}
        super().__init__(
            policy_model,
            tokenizer,
            reward_model,
            value_model=value_model,
            device=device,
            config=replace(config or PPOConfig.spec(), **given),  # type: ignore[arg-type]
            engine=engine,
            reference_model=reference_model,
            environment=environment,
            reward_device=reward_device,
        )
        self._value_model = value_model
        self.last_rollout: Rollout | None = None

    policy_model = property(lambda self: self.policy.model)
    value_model = property(lambda self: self._value_model)

    @property
    def reward_model(self) -> Any:
        return self.scorer.reward

    @reward_model.setter
    def reward_model(self, reward_model: Reward) -> None:
        self.scorer = placed_scorer(
            reward_model,
            policy=self.policy,
            reference=self.reference,
            critic=self.critic,
            value_model=self.value_model,
            tokenizer=self.tokenizer,
            config=self.config,
            device=self.device,
            reward_device=self.reward_device,
        )

    @property
    def reference_model(self) -> nn.Module:
        return self.reference.model

    @reference_model.setter
    def reference_model(self, reference_model: nn.Module) -> None:
        to_device(reference_model, "reference_model", self.device)
        self.reference = make_reference(
            self.policy, reference_model, self.config, self.critic.module
        )

    @property
    def policy_optimizer(self) -> Optimizer:
        return self.learner.optimizers["policy"]

    @policy_optimizer.setter
    def policy_optimizer(self, optimizer: Optimizer) -> None:
        self.learner.optimizers["policy"] = optimizer

    @property
    def value_optimizer(self) -> Optimizer | None:
        return self.learner.optimizers.get("value")

    @value_optimizer.setter
    def value_optimizer(self, optimizer: Optimizer) -> None:
        self.learner.optimizers["value"] = optimizer

    @property
    def stats(self) -> dict[str, Any]:
        return self.progress.stats

    def get_statistics(self) -> dict[str, Any]:
        """Return ``stats``, and avg_reward, avg_kl_divergence, avg_policy_loss, avg_value_loss."""
        return self.progress.statistics()

    def train(  # type: ignore[override]
        self,
        prompts: Prompts | Stream,
        num_steps: int = 100,
        batch_size: int = 4,
        num_epochs_per_batch: int | None = None,
        max_length: int | None = None,
        temperature: float | None = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_freq: int = 10,
        *,
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
        """Train as ``PPO.train`` does.

        By default, ``num_epochs_per_batch`` (4), ``max_length`` (150) and ``temperature`` (1.0) are
        the config's.
        """
        self._check_epochs(num_epochs_per_batch)
        return super().train(
            prompts,
            num_steps,
            batch_size,
            num_epochs=num_epochs_per_batch,
            max_length=max_length,
            temperature=temperature,
            checkpoint_dir=checkpoint_dir,
            checkpoint_freq=checkpoint_freq,
            keep_last=keep_last,
            max_time=max_time,
            evaluation=evaluation,
            callbacks=callbacks,
            report_to=report_to,
            metric_names=metric_names,
            control=control,
            progress=progress,
            on_step=on_step,
        )

    def step(
        self,
        prompts: Prompts,
        *,
        num_epochs: int | None = None,
        max_length: int | None = None,
        temperature: float | None = None,
        more_prompts: Callable[[int], list[Example]] | None = None,
    ) -> Step:
        """Run a step as ``PPO.step`` does, and keep its rollout for methods that take texts."""
        step = super().step(
            prompts,
            num_epochs=num_epochs,
            max_length=max_length,
            temperature=temperature,
            more_prompts=more_prompts,
        )
        self.last_rollout = step.rollout
        return step

    def train_step(
        self,
        prompts: Prompts,
        num_epochs_per_batch: int | None = None,
        max_length: int | None = None,
        temperature: float | None = None,
    ) -> dict[str, float]:
        """Run one step (sample, score, update), and return its metrics."""
        self._check_epochs(num_epochs_per_batch)
        return self.step(
            prompts,
            num_epochs=num_epochs_per_batch,
            max_length=max_length,
            temperature=temperature,
        ).metrics

    def update(
        self, experience: Experience, num_epochs_per_batch: int | None = None
    ) -> dict[str, float]:
        """Train policy and critic on a batch of experience; see ``PPO.update``."""
        self._check_epochs(num_epochs_per_batch)
        return super().update(experience, num_epochs_per_batch)

    def _check_epochs(self, num_epochs_per_batch: int | None) -> None:
        """Check the number of epochs, under the name that callers of this class know."""
        epochs = self.config.num_epochs if num_epochs_per_batch is None else num_epochs_per_batch
        check_counts(num_epochs_per_batch=epochs)

    def rollout(
        self,
        prompts: Prompts,
        max_length: int | None = None,
        temperature: float | None = None,
        *,
        samples_per_prompt: int | None = None,
        seeds: Tensor | None = None,
        greedy: bool = False,
        scorer: Scorer | None = None,
    ) -> Rollout:
        """Sample as ``PPO.rollout`` does, and keep the rollout for methods that take texts."""
        rollout = super().rollout(
            prompts,
            max_length,
            temperature,
            samples_per_prompt=samples_per_prompt,
            seeds=seeds,
            greedy=greedy,
            scorer=scorer,
        )
        self.last_rollout = replace(rollout, trunk_states=None, states=None)
        return rollout
