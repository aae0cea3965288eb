"""PPO for a causal language model, as the algorithm reads.

prompts --rollout--> Rollout --make_experience--> Experience --update--> metrics
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ppo_fast.checks import check_counts, with_names_checked
from ppo_fast.config import PPOConfig, warn_of_discount
from ppo_fast.data.examples import Example, as_examples
from ppo_fast.data.experience import Experience
from ppo_fast.data.prompts import check_lengths
from ppo_fast.data.rollout import Rollout
from ppo_fast.data.scores import Scores
from ppo_fast.data.step import Step, token_numbers
from ppo_fast.learning.make_experience import make_experience, warn_of_disagreement, with_trunk
from ppo_fast.learning.response_metrics import response_metrics
from ppo_fast.models.attention import without_cudnn_attention
from ppo_fast.models.checks import context_limit
from ppo_fast.parts import make_parts, placed_scorer
from ppo_fast.rewards.functions import RewardFunction
from ppo_fast.rewards.score import check_scores
from ppo_fast.rewards.scorer import Scorer
from ppo_fast.rollout import Engine, eos_ids
from ppo_fast.rollout.resample import resample
from ppo_fast.rollout.sampler import MakeEnvironment
from ppo_fast.running import Prompts, Running
from ppo_fast.runs.performance import Performance
from ppo_fast.runs.progress import Progress

# A string or path is that of a classifier's directory.
OneReward = nn.Module | RewardFunction | str | Path
Reward = OneReward | Sequence[OneReward] | Mapping[str, OneReward]


class PPO(Running):
    """Trains a causal language model by PPO against a reward.

    Args:
        policy: the transformers causal LM that is trained. It is moved to ``device``, its dropout
            is switched off and weights stored in half precision become float32.
        tokenizer: the policy's, with a pad token.
        reward: a function ``f(prompts, completions, **columns) -> list[float]``, which gets those
            columns of the prompts' rows that it names; a module that gives one score per sequence
            (``ppo_fast.RewardModel``, a transformers classifier with one label, your own); the
            directory of a classifier, which is then asked through its own tokenizer; or a list or
            dict of these, added with ``config.reward_weights`` (docs/rewards.md).
        value_model: for ``critic="model"``: a module ``forward(input_ids, attention_mask)`` that
            gives one value per token [B, L] (``ppo_fast.ValueModel``) or per sequence [B].
        reference_model: the model that the KL is measured to, of the policy's vocabulary; it is
            frozen. None: the policy as it is now.
        device: where everything runs; models on the CPU are moved there. None: where the policy is;
            "auto": a GPU if there is one.
        reward_device: where reward models run; None: on ``device``, or where they are if that is
            another one than the CPU.
        config: every setting; None: ``PPOConfig()``.
        engine: samples responses (``ppo_fast.rollout``); None: the policy does, in this process.
        environment: makes, for a prompt, an object whose ``reply(turn)`` continues a response after
            each turn of the policy (``ppo_fast.rollout.Environment``); None: responses have one
            turn.

    Attributes:
        policy, reference: LanguageModels, with the transformers model in ``model``. The reference
            is the frozen model that the KL is measured to; a copy of the policy shares its frozen
            weights.
        critic: estimates values.
        engine: samples tokens.
        texts: turns prompts into ids, and sampled ids into texts.
        sampler: samples responses, by engine and texts.
        scorer: calls the reward.
        learner: updates policy and critic; owns their optimizers.
        progress: counts steps, prompts and samples.
        performance: measures steps.
        config, device, tokenizer: as given or resolved.
        newest_checkpoint: the file that was written or loaded last, or None.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which and how to mend it.
    """

    @with_names_checked
    @without_cudnn_attention()
    def __init__(
        self,
        policy: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        reward: Reward,
        *,
        value_model: nn.Module | None = None,
        reference_model: nn.Module | None = None,
        device: torch.device | str | None = None,
        reward_device: torch.device | str | None = None,
        config: PPOConfig | None = None,
        engine: Engine | None = None,
        environment: MakeEnvironment | None = None,
    ) -> None:
        if config is not None and not isinstance(config, PPOConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected a PPOConfig(...)")
        self._config = config = config or PPOConfig()
        parts = make_parts(
            policy,
            tokenizer,
            reward,
            value_model=value_model,
            reference_model=reference_model,
            device=device,
            reward_device=reward_device,
            config=config,
            engine=engine,
            environment=environment,
        )
        self.device, self.reward_device = parts.device, reward_device
        self.policy, self.reference, self.critic = parts.policy, parts.reference, parts.critic
        self.texts, self.sampler = parts.texts, parts.sampler
        self.scorer, self.learner = parts.scorer, parts.learner
        self.performance = Performance(parts.policy, parts.critic, config)
        self.progress = Progress(config.seed)
        self.newest_checkpoint: Path | None = None
        self._warned = False

    engine = property(
        lambda self: self.sampler.engine, lambda self, new: setattr(self.sampler, "engine", new)
    )
    tokenizer = property(
        lambda self: self.texts.tokenizer, lambda self, new: setattr(self.texts, "tokenizer", new)
    )

    # The algorithm

    @without_cudnn_attention()
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
        """Sample responses to prompts from the current policy.

        Args:
            prompts: texts, tokenised as the tokenizer does by default; lists of token ids; chats,
                by the tokenizer's chat template; or rows of data with one of these in "prompt".
            max_length: max response tokens; None: the config's.
            temperature: None: the config's.
            samples_per_prompt: responses to each prompt, in rows next to one another, B in all;
                None: the config's.
            seeds: [B] int64; each draw depends on its sequence's seed and the token's position.
                None: new seeds, which change no draw of later steps.
            greedy: take the likeliest token each time, instead of drawing one.
            scorer: whose rewards that ask servers or are async functions are asked for each
                response as it ends; ``scores`` waits for the answers. None: ``scores`` asks.
        """
        count = samples_per_prompt
        count = self.config.samples_per_prompt if count is None else count
        check_counts(samples_per_prompt=count)
        sampling = self.config.sampling(max_length, temperature)
        sampling = replace(sampling, top_k=1) if greedy else sampling
        self._warned = self._warned or warn_of_discount(self.config.gamma, sampling.max_length)
        examples = as_examples(prompts)
        if seeds is None:
            seeds = self.progress.seeds_outside(len(examples) * count)
        model, readers = self.policy.model, self._readers()
        sample = partial(self.sampler.sample, model, examples, sampling, seeds, count, readers)
        if scorer is None:
            return sample()
        return scorer.while_sampling([e for e in examples for _ in range(count)], sample)

    def score(self, rollout: Rollout) -> Tensor:
        """Compute the rewards' scores of a rollout: [B], or [B, T], one a response token."""
        return self.scores(rollout).total

    @without_cudnn_attention()
    def scores(self, rollout: Rollout, scorer: Scorer | None = None) -> Scores:
        """Compute the scores of a rollout, and those of each reward and of its parts.

        ``scorer``: of ``make_scorer``; None: the trainer's.
        """
        scorer = scorer or self.scorer
        return scorer.of_rollout(self._with_trunk(rollout, scorer))

    def make_scorer(self, reward: Reward) -> Scorer:
        """Make a scorer of other rewards than the trainer's, with weights of 1."""
        return placed_scorer(
            reward,
            policy=self.policy,
            reference=self.reference,
            critic=self.critic,
            tokenizer=self.tokenizer,
            config=replace(self.config, reward_weights=()),
            device=self.device,
            reward_device=self.reward_device,
        )

    def _with_trunk(self, rollout: Rollout, scorer: Scorer | None = None) -> Rollout:
        """Return ``rollout`` with the trunk states that the rewards read, if they read any."""
        if not (scorer or self.scorer).reads_trunk:
            return rollout
        return with_trunk(rollout, self.policy, self.config.forward_batch_tokens, whole=True)

    @without_cudnn_attention()
    def make_experience(
        self,
        rollout: Rollout,
        scores: Scores | Tensor | Sequence[float] | Sequence[Sequence[float]] | None = None,
    ) -> Experience:
        """Compute rewards, values, advantages and returns of a rollout.

        Args:
            rollout: from ``rollout``, before the policy is updated.
            scores: one per sequence [B], or one per response token [B, T] (or B lists of each
                response's length); None: the reward's.

        Raises:
            ValueError: a sequence is longer than the context of a model that reads it.
        """
        check_lengths(rollout.tokens.lengths.tolist(), context_limit(self._readers()))
        if not rollout.prompts:  # made from tokens
            self.texts.check(rollout.tokens, self.device)
            rollout = self.texts.decode(rollout)
        if scores is None:
            rollout = self._with_trunk(rollout)
            scores = self.scores(rollout)
        if not isinstance(scores, Scores):
            lengths = rollout.tokens.response_lengths
            scores = Scores(check_scores(scores, rollout.prompts, lengths=lengths))
        with self.reference.resident():
            experience = make_experience(
                rollout,
                scores.total.to(self.device),
                policy=self.policy,
                reference=self.reference,
                critic=self.critic,
                config=self.config,
                kl_coef=self.learner.kl_coefficient(self.progress.steps),
                moments=self.learner.reward_moments,
            )
        responses = response_metrics(rollout.tokens, eos_ids(self.policy.model, self.tokenizer))
        return replace(experience, metrics=experience.metrics | responses | scores.metrics())

    @without_cudnn_attention()
    def update(self, experience: Experience, num_epochs: int | None = None) -> dict[str, float]:
        """Train policy and critic on a batch of experience; counts as one step.

        Args:
            experience: from ``make_experience``.
            num_epochs: passes over it; None: the config's.

        Returns:
            Plain floats: policy_loss, value_loss, kl_divergence (token mean of log pi - log ref,
            as sampled), mean_reward (of the scores, before KL), mean_advantage (before
            whitening), and more (docs/metrics.md).

        Raises:
            NotFiniteError: a loss or gradient was not finite; see ``Learner.update``.
        """
        epochs = self._epochs(num_epochs)
        steps = self.progress.steps
        metrics = self.learner.update(
            experience,
            policy_epochs=epochs if steps >= self.config.critic_warmup_steps else 0,
            value_epochs=self.config.value_epochs or epochs,
            seed=self.progress.seed_of("minibatches", steps),
            steps=steps,
        )
        metrics = experience.metrics | {"value_loss": 0.0} | metrics
        self.progress.count_step(metrics)
        return metrics

    def step(
        self,
        prompts: Prompts,
        *,
        num_epochs: int | None = None,
        max_length: int | None = None,
        temperature: float | None = None,
        more_prompts: Callable[[int], list[Example]] | None = None,
    ) -> Step:
        """Run one step of PPO: sample, score, update.

        Args:
            prompts: the batch.
            num_epochs, max_length, temperature: None: the config's.
            more_prompts: with ``max_resampled_batches``, gives new prompts in place of those whose
                samples all got one score; None: these are sampled once more.

        Returns:
            The Step. Its metrics are those of ``update``, of the responses and of the performance,
                and the seconds of each part, as time/rollout, time/experience and time/update.
        """
        self._epochs(num_epochs)
        self.learner.schedule.check(self.progress.steps)
        examples = as_examples(prompts)
        self._check_columns({name for e in examples for name in e.columns})
        self.performance.begin_step()
        times = [time.perf_counter()]
        sample = partial(self._sample, max_length=max_length, temperature=temperature)
        rollout = sample(examples)
        times.append(time.perf_counter())
        rollout = self._with_trunk(rollout)
        scores = self.scores(rollout)
        resampled: dict[str, float] = {}
        if self.config.max_resampled_batches > 0:
            rollout, scores, resampled = resample(
                rollout,
                scores,
                examples,
                sample=sample,
                score=self.scores,
                draw=more_prompts,
                most=self.config.max_resampled_batches,
            )
        experience = self.make_experience(rollout, scores)
        times.append(time.perf_counter())
        metrics = self.update(experience, num_epochs) | resampled
        times.append(time.perf_counter())
        warn_of_disagreement(self.policy, self.config, metrics)
        parts = ("rollout", "experience", "update")
        for part, start, end in zip(parts, times, times[1:], strict=False):
            metrics[f"time/{part}"] = end - start
        epochs = self._epochs(num_epochs)
        metrics |= self.performance.metrics(
            rollout,
            metrics,
            policy_epochs=epochs if self.progress.steps > self.config.critic_warmup_steps else 0,
            value_epochs=self.config.value_epochs or epochs,
            old_computed="sampling_logprob_difference" in metrics,
        )
        light = replace(rollout, trunk_states=None, states=None)
        return Step(
            self.progress.steps,
            metrics,
            light,
            experience.scores,
            scores.parts,
            token_numbers(experience, valued=self.critic.trained),
        )

    def _sample(
        self, prompts: list[Example], *, max_length: int | None, temperature: float | None
    ) -> Rollout:
        """Sample a step's responses, and count them."""
        count = self.config.samples_per_prompt
        seeds = self.progress.step_seeds(len(prompts) * count)
        rollout = self.rollout(prompts, max_length, temperature, seeds=seeds, scorer=self.scorer)
        self.progress.sequences_sampled += len(seeds)
        return rollout
