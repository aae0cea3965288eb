"""Learner: trains on experience, in epochs, minibatches, microbatches and optimizer steps."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.config import PPOConfig
from ppo_fast.critics.critic import Critic
from ppo_fast.data.batches import batches_by_tokens
from ppo_fast.data.experience import Batch, Experience, select
from ppo_fast.learning.optimizers import make_adamw
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.ops import ppo_loss, value_loss
from ppo_fast.ops.stats import (
    PPO_STATS,
    VALUE_STATS,
    merge_stats,
    ppo_metrics,
    value_metrics,
)


class Learner:
    """Trains a policy and its critic on experience. Owns their optimizers.

    Args:
        policy: the policy that sampled.
        critic: estimates values.
        config: settings of losses, epochs and optimizers.

    Attributes:
        optimizers: by name: "policy" and, where the critic has weights, "value".
        amid_update: whether an update began and did not end, so that the weights are those of no
            whole step.
    """

    def __init__(self, policy: LanguageModel, critic: Critic, config: PPOConfig) -> None:
        self.policy, self.critic, self.config = policy, critic, config
        self.optimizers = {"policy": make_adamw(policy.model, config.learning_rate, config)}
        if critic.trained:
            rate = config.value_learning_rate or config.learning_rate
            self.optimizers["value"] = make_adamw(critic.module, rate, config)
        self.amid_update = False

    @torch.enable_grad()
    def update(self, experience: Experience, *, num_epochs: int, seed: int) -> dict[str, float]:
        """Train by PPO on one batch of experience (Schulman et al. 2017, algorithm 1).

        Each epoch visits every sequence once, in minibatches drawn with ``seed``; a minibatch is
        one optimizer step. Its losses are normalised by all its tokens, so that the split into
        microbatches changes nothing but rounding.

        Returns:
            Means over all tokens and epochs (policy_loss too, whatever the aggregation);
                ``first_max_log_ratio`` is the largest log-ratio of the first minibatch, whose
                ratios are 1 but for rounding.

        Raises:
            FloatingPointError: a gradient is not finite. It changed nothing; earlier optimizer
                steps of this update stand, including the policy's before a value model's.
        """
        self.amid_update = True
        if self.config.gradient_checkpointing:  # transformers checkpoints in train mode alone
            self.policy.model.train()
            self.critic.module.train()
        generator = torch.Generator().manual_seed(seed)
        policy_stats: list[Tensor] = []
        value_stats: list[Tensor] = []
        norms: list[Tensor] = []
        for _ in range(num_epochs):
            order = torch.randperm(len(experience.tokens), generator=generator, device="cpu")
            for rows in order.tensor_split(min(self.config.num_minibatches, len(order))):
                stats, values, norm = self._train_on(experience, rows)
                policy_stats.append(stats)
                value_stats += values
                norms.append(norm)
        metrics = ppo_metrics(merge_stats(PPO_STATS, policy_stats))
        metrics["first_max_log_ratio"] = ppo_metrics(policy_stats[0])["max_log_ratio"]
        if value_stats:
            metrics |= value_metrics(merge_stats(VALUE_STATS, value_stats))
        if self.config.entropy_coef == 0:
            del metrics["entropy"]  # it was not computed
        metrics["policy_grad_norm"] = float(torch.stack(norms).mean())
        self.amid_update = False
        return metrics

    def _train_on(
        self, experience: Experience, rows: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Train on one minibatch; return its statistics and the norm of the policy's gradient.

        A head is trained in the policy's backward pass. A value model of its own is trained after
        the policy, so that the graphs, and the gradients, of both are never in memory at the same
        time.
        """
        joint = self.critic.reads_states
        tokens = experience.tokens
        count = int(tokens.response_lengths[rows].sum())
        units = count if self.config.aggregation == "token-mean" else len(rows)
        parts = batches_by_tokens(tokens.lengths[rows], self.config.microbatch_tokens)
        policy_stats, value_stats = [], []
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()  # what an interrupted pass, or the user, may have left
        for part in parts:
            batch = select(experience, rows[part])
            loss, stats, states = self._policy_loss(batch, experience.temperature, units)
            policy_stats.append(stats)
            if joint:
                critic_loss, stats = self._value_loss(batch, states, count)
                value_stats.append(stats)
                loss = loss + critic_loss
            loss.backward()
        norm = self._step(("policy", "value") if joint else ("policy",))
        if self.critic.trained and not joint:
            for part in parts:
                loss, stats = self._value_loss(select(experience, rows[part]), None, count)
                value_stats.append(stats)
                loss.backward()
            self._step(("value",))
        merged = [merge_stats(VALUE_STATS, value_stats)] if value_stats else []
        return merge_stats(PPO_STATS, policy_stats), merged, norm

    def _policy_loss(
        self, batch: Batch, temperature: float, units: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        config, tokens = self.config, batch.tokens
        forward = self.policy.forward(tokens, batch.trunk_states)
        new = self.policy.logprobs(
            forward, tokens, temperature=temperature, entropy=config.entropy_coef != 0
        )
        in_loss = config.kl_in == "loss"
        loss, stats = ppo_loss(
            new.logprobs,
            old_logprobs=batch.old_logprobs,
            advantages=batch.advantages,
            mask=tokens.response_mask,
            entropy=new.entropy,
            ref_logprobs=batch.ref_logprobs,
            clip=config.clip,
            dual_clip=config.dual_clip,
            kl_coef=config.kl_penalty if in_loss else 0.0,
            kl_estimator=config.estimator() if in_loss else "k1+k2",
            entropy_coef=config.entropy_coef,
            aggregation=config.aggregation,
            normalizer=units,
        )
        return loss, stats, forward.states

    def _value_loss(self, batch: Batch, states: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        loss, stats = value_loss(
            self.critic.values(batch.tokens, states, batch.trunk_states),
            old_values=batch.values,
            returns=batch.returns,
            mask=batch.tokens.response_mask,
            clip=self.config.value_clip,
            normalizer=count,
        )
        return self.config.value_loss_coef * loss, stats

    def _step(self, names: tuple[str, ...]) -> Tensor:
        """Clip and apply the gradients of these optimizers.

        Returns the norm of the first one's gradients before clipping.
        """
        optimizers = {name: self.optimizers[name] for name in names}
        norms = {}
        for name, optimizer in optimizers.items():
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            norms[name] = torch.nn.utils.clip_grad_norm_(weights, self.config.max_grad_norm)
        if not torch.isfinite(torch.stack(list(norms.values()))).all():
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            found = ", ".join(f"{name} {float(norm)}" for name, norm in norms.items())
            raise FloatingPointError(
                f"gradient norms: {found}; expected finite numbers. The weights are as they were "
                "before this optimizer step. Lower the learning rate, or look for NaN in the "
                "models' outputs"
            )
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        return next(iter(norms.values()))
