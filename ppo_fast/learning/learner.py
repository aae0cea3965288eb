"""Learner: trains on experience, in epochs, minibatches, microbatches and optimizer steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ppo_fast.config import PPOConfig
from ppo_fast.critics.critic import Critic
from ppo_fast.data.batches import batches_of
from ppo_fast.data.experience import Batch, Experience, Moments, select
from ppo_fast.learning.coefficients import Coefficients
from ppo_fast.learning.guard import Guard
from ppo_fast.learning.minibatches import Done, Found, Terms
from ppo_fast.learning.optimizers import clip_gradients, make_adamw
from ppo_fast.learning.schedules import Schedule, current_rates
from ppo_fast.learning.streamed import StreamedStates
from ppo_fast.learning.undo import Undo
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.nonfinite import NotFiniteError
from ppo_fast.ops import ppo_loss, value_loss
from ppo_fast.ops.stats import PPO_STATS, merge_stats, ppo_metrics
from ppo_fast.rewards.shaping import NO_SCORES

logger = logging.getLogger(__name__)


class Learner:
    """Trains a policy and its critic on experience. Owns their optimizers and coefficients.

    Args:
        policy: the policy that sampled.
        critic: estimates values.
        config: settings of losses, epochs and optimizers.

    Attributes:
        optimizers: by name: "policy" and, where the critic has weights, "value".
        coefficients: those of the KL and of the entropy bonus.
        states: makes the optimizers' steps.
        schedule: learning rates of the optimizers.
        reward_moments: of the scores of all updates, where they are normalised by these.
        amid_update: whether an update began and did not end, so that the weights are those of no
            whole step.
    """

    def __init__(self, policy: LanguageModel, critic: Critic, config: PPOConfig) -> None:
        self.policy, self.critic, self.config = policy, critic, config
        rates = {"policy": config.learning_rate}
        self.optimizers = {"policy": make_adamw(policy.model, config.learning_rate, config)}
        if critic.trained:
            rates["value"] = config.value_learning_rate or config.learning_rate
            self.optimizers["value"] = make_adamw(critic.module, rates["value"], config)
        self.states = StreamedStates(on="optimizer" in config.offload)
        for optimizer in self.optimizers.values():
            self.states.adopt(optimizer)
        self.coefficients = Coefficients(config)
        self.schedule = Schedule(config, rates)
        self.reward_moments = NO_SCORES
        self.amid_update = False
        self.guard, self._undo = Guard(policy, critic, config), Undo(self.optimizers)

    def kl_coefficient(self, steps: int) -> float:
        """Return the coefficient of the KL to the reference after ``steps`` steps of PPO."""
        return self.coefficients.kl(self.schedule.share(steps))

    def set_kl_coefficient(self, coefficient: float, steps: int) -> None:
        """Set the KL's coefficient after ``steps`` steps; a course of it is scaled."""
        self.coefficients.set_kl(coefficient, self.schedule.share(steps))

    def check_kl_coefficient(self, coefficient: float, steps: int) -> None:
        """Raise ValueError if the KL's coefficient cannot be set to this."""
        self.coefficients.check_kl(coefficient, self.schedule.share(steps))

    def check_rate(self, name: str) -> None:
        """Raise ValueError if the learning rate of "policy" or "value" cannot be set."""
        if name not in self.optimizers:
            raise ValueError("value_learning_rate: the trainer has no value function")
        self.schedule.check_rate(name, self.optimizers[name])

    def set_rate(self, name: str, rate: float) -> float:
        """Set the highest learning rate of "policy" or "value", and return the one before."""
        return self.schedule.set_rate(name, rate, self.optimizers[name])

    @torch.enable_grad()
    def update(
        self,
        experience: Experience,
        *,
        policy_epochs: int,
        value_epochs: int,
        seed: int,
        steps: int = 0,
    ) -> dict[str, float]:
        """Train by PPO on one batch of experience (Schulman et al. 2017, algorithm 1).

        Each epoch visits every sequence once, in minibatches drawn with ``seed``; a minibatch is
        one optimizer step. Its losses are normalised by all its tokens, so that the split into
        microbatches changes nothing but rounding. With ``target_kl``, the policy's epochs end
        before the optimizer step at which its KL to the policy that sampled is larger.

        Args:
            experience: the batch.
            policy_epochs, value_epochs: passes over it; 0: no training.
            seed: seed of the minibatches.
            steps: steps of PPO done, for schedules.

        Returns:
            Means over all tokens and epochs (policy_loss too, whatever the aggregation);
                ``first_max_log_ratio`` is the largest log-ratio of the first minibatch, whose
                ratios are 1 but for rounding.

        Raises:
            NotFiniteError: a loss or a gradient is not finite (with ``on_nonfinite="skip"``: in
                ``max_skipped`` optimizer steps in a row). Earlier optimizer steps of this update
                stand. With ``undo_updates``, they do not, and the error is also raised where the
                outputs after the update are not finite.
        """
        self.schedule.check(steps)
        state = self.state_dict()
        if self.config.undo_updates:
            self._undo.keep()
        self.amid_update = True
        try:
            metrics = self._update(experience, policy_epochs, value_epochs, seed, steps)
            if self.config.undo_updates:
                self.guard.check_outputs()
        except NotFiniteError as error:
            for optimizer in self.optimizers.values():
                optimizer.zero_grad()
            if not self.config.undo_updates:
                raise
            self._undo.put_back()
            self.load_state_dict(state)
            self.amid_update = False
            raise NotFiniteError(f"{error}. The update was undone") from error
        self.reward_moments = experience.reward_moments or NO_SCORES
        self.amid_update = False
        return metrics

    def _update(
        self,
        experience: Experience,
        policy_epochs: int,
        value_epochs: int,
        seed: int,
        steps: int,
    ) -> dict[str, float]:
        """Train in epochs and minibatches."""
        if self.config.gradient_checkpointing:  # transformers checkpoints in train mode alone
            self.policy.model.train()
            self.critic.module.train()
        generator = torch.Generator().manual_seed(seed)
        terms = Terms(
            self.config,
            kl_coef=self.kl_coefficient(steps),
            entropy_coef=self.coefficients.entropy(experience.metrics.get("entropy", 0.0)),
            temperature=experience.temperature,
            max_length=experience.max_length,
        )
        self.schedule.begin_update(steps)
        done = Done()
        for epoch in range(max(policy_epochs, value_epochs)):
            if epoch < policy_epochs and not done.far:
                done.log_ratios, done.masks = [], []
            order = torch.randperm(len(experience.tokens), generator=generator, device="cpu")
            for rows in order.tensor_split(min(self.config.num_minibatches, len(order))):
                self._train_on(
                    experience,
                    rows,
                    terms,
                    done,
                    policy=epoch < policy_epochs and not done.far,
                    value=self.critic.trained and epoch < value_epochs,
                )
        metrics = done.metrics() | current_rates(self.optimizers)
        if terms.entropy_coef == 0 or experience.high_entropy is not None:
            metrics.pop("entropy", None)  # it was not computed, or of some tokens alone
        if self.config.target_kl is not None:
            metrics["policy_optimizer_steps"] = float(len(done.norms))
        if self.config.on_nonfinite == "skip":
            metrics["skipped_optimizer_steps"] = float(done.skipped)
        if self.coefficients.kl_changes:
            metrics["kl_coefficient"] = terms.kl_coef
        if self.config.entropy_target is not None:
            metrics["entropy_coefficient"] = terms.entropy_coef
        if done.policy_stats and {"kl_sequence", "entropy"} <= experience.metrics.keys():
            kl, entropy = (experience.metrics[name] for name in ("kl_sequence", "entropy"))
            self.coefficients.adapt(kl, entropy, len(experience.tokens))
        return metrics

    def train_critic(self, experience: Experience, *, epochs: int, seed: int) -> dict[str, float]:
        """Train the critic alone, outside of the run's steps: nothing else changes.

        Returns its metrics; ``value_loss`` and others.
        """
        moments = self.reward_moments
        with self.schedule.suspended():
            metrics = self.update(experience, policy_epochs=0, value_epochs=epochs, seed=seed)
        self.reward_moments = moments
        return metrics

    def _train_on(
        self,
        experience: Experience,
        rows: Tensor,
        terms: Terms,
        done: Done,
        *,
        policy: bool,
        value: bool,
    ) -> None:
        """Train the policy, the value function or both on one minibatch.

        A head is trained in the policy's backward pass. The backward pass of a value model of its
        own follows the policy's, so that the graphs of both are never in memory at the same time;
        without ``check_gradients_together``, it follows the policy's optimizer step, and neither
        are the gradients.
        """
        joint = policy and value and self.critic.reads_states
        counts = experience.tokens.trained_counts[rows]
        units, count = terms.units(counts), int(counts.sum())
        if count == 0:  # all responses were cut off: Adam would move the weights all the same
            return
        packed = self.policy.packed and self.critic.packed
        tokens = experience.tokens.select(rows)
        parts = batches_of(tokens, self.config.microbatch_tokens, packed=packed)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()  # what an interrupted pass, or the user, may have left
        names: list[str] = []
        found = Found()
        for part in parts if policy else ():
            batch = select(experience, rows[part])
            loss, states = self._policy_loss(batch, terms, units, found)
            if joint:
                loss = loss + self._value_loss(batch, states, count, found)
            loss.backward()
            found.losses.append(loss.detach())
        if policy:
            found.policy_stats = [merge_stats(PPO_STATS, found.policy_stats)]
            done.far = self._is_far(found.policy_stats[0])
            if done.far:
                self.optimizers["policy"].zero_grad()
                found.losses = found.losses if joint else []
            names = ["policy"] * (not done.far) + ["value"] * joint
            if not self.config.check_gradients_together:
                self._step(names, found, experience, done)
                names, found = [], Found()
        for part in parts if value and not joint else ():
            batch = select(experience, rows[part])
            loss = self._value_loss(batch, self._states(batch), count, found)
            loss.backward()
            found.losses.append(loss.detach())
        self._step(names + ["value"] * (value and not joint), found, experience, done)

    def _is_far(self, stats: Tensor) -> bool:
        """Return whether the policy's KL to the one that sampled is beyond ``target_kl``."""
        target = self.config.target_kl
        return target is not None and ppo_metrics(stats)["approx_kl_k3"] > target

    @torch.no_grad()
    def _states(self, batch: Batch) -> Tensor | None:
        """Return the policy's states, without gradient, for a head that is trained alone."""
        if not self.critic.reads_states:
            return None
        return self.policy.forward(batch.tokens, batch.trunk_states).states

    def _policy_loss(
        self, batch: Batch, terms: Terms, units: float, found: Found
    ) -> tuple[Tensor, Tensor | None]:
        config, tokens = self.config, batch.tokens
        forward = self.policy.forward(tokens, batch.trunk_states)
        new = self.policy.logprobs(
            forward, tokens, temperature=terms.temperature, entropy=terms.entropy_coef != 0
        )
        entropy = new.entropy
        if entropy is not None and batch.high_entropy is not None:
            entropy = entropy.masked_fill(~batch.high_entropy, 0.0)
        in_loss = config.kl_in == "loss"
        loss, stats = ppo_loss(
            new.logprobs,
            old_logprobs=batch.old_logprobs,
            advantages=batch.advantages,
            mask=tokens.response_mask,
            entropy=entropy,
            ref_logprobs=batch.ref_logprobs,
            weights=batch.weights,
            ratio=config.ratio,
            objective=config.objective,
            clip=config.clip,
            dual_clip=config.dual_clip,
            kl_coef=terms.kl_coef if in_loss else 0.0,
            kl_estimator=config.estimator() if in_loss else "k1+k2",
            entropy_coef=terms.entropy_coef,
            aggregation=config.aggregation,
            normalizer=units,
        )
        found.policy_stats.append(stats)
        found.log_ratios.append((new.logprobs - batch.old_logprobs).detach())
        found.masks.append(tokens.response_mask)
        return loss, forward.states

    def _value_loss(self, batch: Batch, states: Tensor | None, count: int, found: Found) -> Tensor:
        loss, stats = value_loss(
            self.critic.values(batch.tokens, states, batch.trunk_states),
            old_values=batch.values,
            returns=batch.returns,
            mask=batch.tokens.response_mask,
            clip=self.config.value_clip,
            huber=self.config.value_huber,
            normalizer=count,
        )
        found.value_stats.append(stats)
        return self.config.value_loss_coef * loss

    def _step(self, names: Sequence[str], found: Found, experience: Experience, done: Done) -> None:
        """Clip and apply the gradients of these optimizers, unless something is not finite."""
        optimizers = {name: self.optimizers[name] for name in names}
        weights = {
            name: [p for group in optimizer.param_groups for p in group["params"]]
            for name, optimizer in optimizers.items()
        }
        norms = {
            name: get_total_norm([p.grad for p in part if p.grad is not None])
            for name, part in weights.items()
        }
        step = self.schedule.steps + 1
        admitted = not norms or self.guard.admits(norms, found.losses, experience, step)
        for name, optimizer in optimizers.items():
            if admitted:
                clip_gradients(weights[name], self.config.max_grad_norm, norms[name])
                self.schedule.before_step(name, optimizer)
                self.states.step(optimizer)
            optimizer.zero_grad()
        if admitted:
            done.add(found, norms.get("policy"))
        else:
            done.skipped += 1

    def state_dict(self) -> dict[str, Any]:
        """Return what the learner counts and adapts, besides the optimizers, for a checkpoint."""
        return {
            "coefficients": self.coefficients.state_dict(),
            "reward_moments": list(self.reward_moments),
            "rates": dict(self.schedule.changed),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; an older checkpoint's is empty."""
        self.coefficients, self.reward_moments = Coefficients(self.config), NO_SCORES
        self.schedule.reset_rates(self.optimizers)
        if state:
            self.coefficients.load_state_dict(state["coefficients"])
            self.reward_moments = Moments(*state["reward_moments"])
            for name, rate in state.get("rates", {}).items():
                try:
                    self.check_rate(name)
                except ValueError as error:
                    logger.warning("checkpoint: %s; it stays, instead of %g", error, rate)
                    continue
                self.set_rate(name, rate)
