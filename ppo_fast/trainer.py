"""PPOTrainer: PPO for a causal language model, as the algorithm reads.

prompts --rollout--> Rollout --make_experience--> Experience --update--> metrics
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedTokenizerBase

from ppo_fast import checks
from ppo_fast.config import PPOConfig
from ppo_fast.diagnostics.memory_plan import MemoryPlan, plan_memory
from ppo_fast.learning.half_adamw import HalfAdamW
from ppo_fast.learning.learner import Learner
from ppo_fast.learning.make_experience import (
    Experience,
    computes_in_float32,
    make_experience,
    with_trunk,
)
from ppo_fast.models import setup
from ppo_fast.models.adapters import adapted_layers
from ppo_fast.models.attention import without_cudnn_attention
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.precision import WeightCopies
from ppo_fast.rewards.score import RewardFunction, check_reward_model, check_scores, score
from ppo_fast.rollout import Engine, LocalEngine, Rollout, eos_ids
from ppo_fast.rollout.speedups.cuda_graph_check import CAPTURES
from ppo_fast.runs.loop import TrainingLoop
from ppo_fast.spec_methods import SpecMethods

# Rounding stays far below this: between decoding with a cache and one pass over all tokens in
# float32; in half precision between two passes whose batches differ (0.07 was seen on an H200).
MOST_FIRST_LOG_RATIO = 1e-2
MOST_FIRST_LOG_RATIO_HALF = 0.3


class PPOTrainer(SpecMethods, TrainingLoop):
    """Trains a causal language model by PPO against a reward.

    Args:
        policy_model: the transformers causal LM that is trained. It is moved to ``device``, its
            dropout is switched off and weights stored in half precision become float32.
        value_model: a module ``forward(input_ids, attention_mask)`` that gives a value a token
            [B, L] (``ppo_fast.ValueModel``) or a sequence [B]; None for the critics without one.
        reward_model: a module that gives a score a sequence (``ppo_fast.RewardModel``, a
            transformers classifier with one label, your own), or a function
            ``f(prompts, completions) -> list[float]``.
        tokenizer: the policy's, with a pad token.
        device: where everything runs. Models on the CPU are moved there.
        learning_rate: of AdamW, 1e-5.
        clip_epsilon: the ratio's clip range, 0.2.
        kl_penalty: coefficient of the KL to the reference, 0.1.
        gamma: discount, 0.99.
        gae_lambda: GAE's lambda, 0.95.
        value_loss_coef: weight of the value loss, 0.5.
        max_grad_norm: largest gradient norm, 1.0.
        config: every other setting; ``PPOConfig()`` has what works for language models. The
            arguments above, where given, come before it; without one, the defaults above hold
            (``PPOConfig.spec()``).
        engine: who samples (``ppo_fast.rollout``); None: the policy, in this process.

    Attributes:
        policy_model, value_model, reward_model, tokenizer, device: as given.
        reference_model: the policy as it was at construction, frozen, sharing its frozen weights.
        policy_optimizer, value_optimizer: AdamW over float32 weights; the latter None without a
            value function.
        stats: running totals: total_steps, and sums over steps of the rewards, KLs and losses.
        config: the resolved PPOConfig.
        last_rollout, last_scores: what was sampled last, and its scores [B].

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what it got, what
            was expected and how to mend it.
    """

    @without_cudnn_attention()
    def __init__(
        self,
        policy_model: nn.Module,
        value_model: nn.Module | None,
        reward_model: nn.Module | RewardFunction,
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
    ) -> None:
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
        if config is not None and not isinstance(config, PPOConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected a PPOConfig(...)")
        self.config = replace(config or PPOConfig.spec(), **given)  # type: ignore[arg-type]
        self.device = torch.device(device)
        self.tokenizer = tokenizer
        checks.check_policy(policy_model)
        checks.check_tokenizer(tokenizer, policy_model)
        check_reward_model(reward_model)
        critic = setup.which_critic(self.config, value_model)
        models = {
            "policy_model": policy_model,
            "value_model": value_model,
            "reward_model": reward_model,
        }
        for name, model in models.items():
            checks.place(model, name, self.device)
        self.policy_model, self.value_model = policy_model, value_model
        self.reward_model = reward_model
        setup.prepare(policy_model, value_model, reward_model, self.config)
        setup.hold_weights(policy_model, value_model, self.config)
        self.reference_model = setup.make_reference(policy_model, self.config)
        self.policy = self._language_model(policy_model)
        self.reference = self._language_model(self.reference_model)
        self.critic = setup.make_critic(critic, self.policy, value_model, self.config, self.device)
        self.reward_split = setup.put_on_trunk(reward_model, self.policy)
        setup.check_shared_weights(policy_model, value_model, reward_model, self.critic)
        self.engine = engine or self._local_engine()
        self.weight_copies = WeightCopies(self.config.torch_dtype, self._kept_bytes())
        self.policy_optimizer = self._adamw(policy_model, self.config.learning_rate)
        self.value_optimizer = None
        if self.critic is not None:
            rate = self.config.value_learning_rate or self.config.learning_rate
            self.value_optimizer = self._adamw(self.critic.module, rate)
        self._init_counters()
        self._warned_of_discount = False

    # The algorithm

    @without_cudnn_attention()
    def rollout(
        self,
        prompts: Sequence[str],
        max_length: int | None = None,
        temperature: float | None = None,
        *,
        seeds: Tensor | None = None,
    ) -> Rollout:
        """Sample a response for every prompt from the current policy.

        Args:
            prompts: B texts; tokenised as the tokenizer does by default.
            max_length: most response tokens; None: the config's.
            temperature: None: the config's.
            seeds: [B] int64, what each draw depends on beside the token's place; None: the next
                ones of the trainer's own.
        """
        sampling = self.config.sampling(max_length, temperature)
        self._warn_of_discount(sampling.max_length)
        prompts = checks.check_prompts(prompts)
        prompt_ids = self.tokenizer(prompts)["input_ids"]
        limit = checks.context_limit(self.policy_model)
        checks.check_prompt_ids(prompts, prompt_ids, sampling.max_length, limit)
        seeds = self._next_seeds(len(prompts)) if seeds is None else seeds
        with self.weight_copies.in_use(self.policy_model):
            self.engine.sync_weights(self.policy_model)
            rollout = self.engine.generate(prompt_ids, sampling, seeds=seeds)
        lengths = rollout.tokens.response_lengths.tolist()
        rows = zip(rollout.tokens.response_ids.tolist(), lengths, strict=True)
        completions = self.tokenizer.batch_decode(
            [ids[:length] for ids, length in rows], skip_special_tokens=True
        )
        rollout = replace(rollout, prompts=prompts, completions=completions)
        # without what is large, and read by no one
        self.last_rollout = replace(rollout, trunk=None, states=None)
        return rollout

    @without_cudnn_attention()
    def make_experience(
        self, rollout: Rollout, scores: Tensor | Sequence[float] | None = None
    ) -> Experience:
        """Rewards, values, advantages and returns of a rollout.

        Args:
            rollout: from ``rollout``, before the policy is updated.
            scores: one a sequence [B]; None: the reward model's.
        """
        if scores is None:
            budget = self.config.forward_batch_tokens
            if self.reward_split is not None:
                rollout = with_trunk(rollout, self.policy, budget, whole=True)
            scores = score(
                self.reward_model,
                rollout.tokens,
                rollout.prompts,
                rollout.completions,
                budget=budget,
                split=self.reward_split,
                trunk=rollout.trunk,
            )
        self.last_scores = check_scores(scores, rollout.prompts).to(self.device)
        return make_experience(
            rollout,
            self.last_scores,
            policy=self.policy,
            reference=self.reference,
            critic=self.critic,
            config=self.config,
        )

    @without_cudnn_attention()
    def update(
        self, experience: Experience, num_epochs_per_batch: int | None = None
    ) -> dict[str, float]:
        """Train policy and value function on a batch of experience; counts as one step.

        Args:
            experience: from ``make_experience``.
            num_epochs_per_batch: passes over it; None: the config's num_epochs.

        Returns:
            Plain floats: policy_loss, value_loss, kl_divergence (token mean of log pi - log ref,
            as sampled), mean_reward (of the scores, before KL), mean_advantage (before
            whitening), and more (docs: README).

        Raises:
            FloatingPointError: a gradient was not finite. It changed nothing; earlier optimizer
                steps of this update stand.
        """
        epochs = self.config.num_epochs if num_epochs_per_batch is None else num_epochs_per_batch
        checks.check_counts(num_epochs_per_batch=epochs)
        learner = Learner(
            self.policy, self.critic, self.policy_optimizer, self.value_optimizer, self.config
        )
        seed = self._seed_of("minibatches", int(self.stats["total_steps"]))
        self._amid_update = True
        metrics = {"value_loss": 0.0} | learner.update(experience, num_epochs=epochs, seed=seed)
        metrics = experience.metrics | metrics
        self._count_step(metrics)
        return metrics

    def train_step(
        self,
        prompts: Sequence[str],
        num_epochs_per_batch: int | None = None,
        max_length: int | None = None,
        temperature: float | None = None,
    ) -> dict[str, float]:
        """One step of PPO: sample, score, update.

        Args:
            prompts: the batch.
            num_epochs_per_batch: passes over it, 4.
            max_length: most response tokens, 150.
            temperature: of sampling, 1.0. (These defaults are the config's.)

        Returns:
            As ``update``, and the seconds of each part as time/rollout, time/experience and
            time/update.
        """
        checks.check_counts(
            num_epochs_per_batch=self.config.num_epochs
            if num_epochs_per_batch is None
            else num_epochs_per_batch
        )
        times = [time.perf_counter()]
        rollout = self.rollout(prompts, max_length, temperature)
        times.append(time.perf_counter())
        experience = self.make_experience(rollout)
        times.append(time.perf_counter())
        metrics = self.update(experience, num_epochs_per_batch)
        times.append(time.perf_counter())
        full = computes_in_float32(self.policy)
        most = MOST_FIRST_LOG_RATIO if full else MOST_FIRST_LOG_RATIO_HALF
        if metrics["first_max_log_ratio"] > most:
            warnings.warn(
                f"the first minibatch's ratios are not 1: exp({metrics['first_max_log_ratio']:.2g})"
                f" at most. Decoding and the update compute {type(self.policy_model).__name__} "
                "differently, and what is learned is not to be trusted",
                stacklevel=2,
            )
        for part, start, end in zip(
            ("rollout", "experience", "update"), times, times[1:], strict=False
        ):
            metrics[f"time/{part}"] = end - start
        return metrics

    def memory_plan(self, batch_size: int, prompt_length: int) -> MemoryPlan:
        """What steps of ``batch_size`` prompts, each of at most ``prompt_length`` tokens, take."""
        config = self.config if self.critic is not None else replace(self.config, critic="baseline")
        adapters: Any = getattr(self.policy_model, "peft_config", None) or {}
        return plan_memory(
            self.policy_model.config,
            config,
            batch_size=batch_size,
            prompt_length=prompt_length,
            value_model=self.value_model,
            policy_model=self.policy_model,
            adapter=next(iter(adapters.values()), None),
            device=self.device.type,
        )

    # Construction

    def _language_model(self, model: nn.Module) -> LanguageModel:
        return LanguageModel(
            model,
            num_layers_unfrozen=self.config.num_layers_unfrozen,
            compute_dtype=self.config.torch_dtype,
            logits_budget_bytes=self.config.logits_budget_bytes,
        )

    def _local_engine(self) -> LocalEngine:
        return LocalEngine(
            self.policy,
            eos_ids=partial(eos_ids, self.policy_model, self.tokenizer),
            pad_id=self.tokenizer.pad_token_id,
            slots=self.config.rollout_slots,
            prompt_tokens=self.config.forward_batch_tokens,
            to_text=partial(self.tokenizer.decode, skip_special_tokens=False),
            keep_states=self.critic is not None and self.critic.reads_states,
            whole_trunk=self.reward_split is not None,
            cuda_graphs=self.config.cuda_graphs,
            kept_bytes=self._kept_bytes(),
        )

    def _kept_bytes(self) -> int:
        """For what is kept between rollouts, from which graphs alone gain; LocalEngine keeps none
        of a model with adapters."""
        graphs = self.device.type in CAPTURES and self.config.cuda_graphs
        keeps = graphs and not adapted_layers(self.policy_model)
        return self.config.kept_rollout_bytes if keeps else 0

    def _adamw(self, model: nn.Module, learning_rate: float) -> Optimizer:
        config = self.config
        trained = [p for p in model.parameters() if p.requires_grad]
        settings: dict[str, Any] = {
            "lr": learning_rate,
            "betas": config.adam_betas,
            "eps": config.adam_eps,
            "weight_decay": config.weight_decay,
        }
        if config.trained_weights == "float32":
            return AdamW(trained, **settings | {config.adamw: True})
        return HalfAdamW(trained, **settings, rounding=config.trained_weights, seed=config.seed)

    def _warn_of_discount(self, max_length: int) -> None:
        """Once, where the score of a long response hardly counts for its first token."""
        gamma, weight = self.config.gamma, self.config.gamma**max_length
        if weight < 0.5 and not self._warned_of_discount:
            self._warned_of_discount = True
            warnings.warn(
                f"gamma: {gamma} over {max_length} tokens leaves {weight:.2f} of the score at a "
                "response's first token; gamma=1 counts it in full",
                stacklevel=3,
            )
