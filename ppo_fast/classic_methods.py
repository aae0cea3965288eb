"""Methods of the classic interface that each compute one thing, from tensors or from texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppo_fast.data.batches import in_batches
from ppo_fast.data.examples import as_examples
from ppo_fast.data.prompts import check_lengths
from ppo_fast.data.rollout import Rollout
from ppo_fast.data.tokens import Tokens
from ppo_fast.data.trunk_states import TrunkStates
from ppo_fast.models.attention import without_cudnn_attention
from ppo_fast.models.checks import context_limit
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.ops import gae, ppo_loss
from ppo_fast.ppo import PPO, Prompts
from ppo_fast.rewards.shaping import place_scores
from ppo_fast.rollout.texts import Pairs


class ClassicMethods(PPO):
    """Base of PPOTrainer with these methods.

    Attributes:
        last_rollout: the last rollout, or None; the texts of its pairs stand for its tokens.
    """

    last_rollout: Rollout | None

    # the config's numbers, read-only, under the names of the classic interface
    clip_epsilon = property(lambda self: self.config.clip_epsilon)
    kl_penalty = property(lambda self: self.config.kl_penalty)
    gamma = property(lambda self: self.config.gamma)
    gae_lambda = property(lambda self: self.config.gae_lambda)
    value_loss_coef = property(lambda self: self.config.value_loss_coef)
    max_grad_norm = property(lambda self: self.config.max_grad_norm)

    def compute_gae(
        self, rewards: Tensor, values: Tensor, dones: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute (advantages, returns), [B, T] each, by GAE with the trainer's gamma and lambda.

        (Schulman et al. 2016, eq. 16.) ``dones`` [B, T]: the episode ends with that step.
        """
        result = gae(
            rewards,
            values,
            dones=None if dones is None else dones.bool(),
            gamma=self.config.gamma,
            lam=self.config.gae_lambda,
        )
        return result.advantages, result.returns

    def compute_kl_divergence(self, current_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
        """Compute the mean of current - reference, a 0-dim tensor."""
        return (current_logprobs - reference_logprobs).mean()

    def compute_ppo_loss(
        self, old_logprobs: Tensor, new_logprobs: Tensor, advantages: Tensor
    ) -> Tensor:
        """Compute the clipped loss, a 0-dim tensor (Schulman et al. 2017, eq. 7).

        It is -mean(min(ratio A, clip(ratio) A)) with ratio = exp(new - old).
        """
        return ppo_loss(
            new_logprobs,
            old_logprobs=old_logprobs,
            advantages=advantages,
            mask=torch.ones_like(new_logprobs, dtype=torch.bool),
            clip=self.config.clip,
            dual_clip=self.config.dual_clip,
        ).loss

    def generate_responses(
        self,
        prompts: Prompts,
        max_length: int | None = None,
        temperature: float | None = None,
    ) -> tuple[list[str], Tensor]:
        """Sample responses from the current policy; return them and their log-probs [B, T].

        ``max_length`` (150) counts response tokens, ``temperature`` is 1.0 by default.
        """
        rollout = self.rollout(prompts, max_length, temperature, samples_per_prompt=1)
        known = rollout.sampling_logprobs if rollout.logprobs is None else rollout.logprobs
        assert known is not None  # engines know these
        return rollout.completions, known

    @without_cudnn_attention()
    def compute_rewards(self, prompts: Sequence[Any], responses: Sequence[str]) -> Tensor:
        """Compute [B, T]: the reward model's score on each response's last token, 0 elsewhere.

        A reward model that gives one score a token gives those.
        """
        pairs = self._pairs(prompts, responses)
        examples = as_examples(prompts)
        scores = self.scorer.of_tokens(pairs.tokens, pairs.prompts, list(responses), examples)
        return place_scores(scores.total, pairs.tokens)

    @without_cudnn_attention()
    @torch.no_grad()
    def compute_values(self, prompts: Sequence[Any], responses: Sequence[str]) -> Tensor:
        """Compute the values [B, T] of the state before each response token.

        Raises:
            ValueError: the trainer has no value function (critic="baseline").
        """
        if not self.critic.trained:
            raise ValueError(
                "compute_values: the critic has no value function; pass a value_model or "
                "config=PPOConfig(critic='head')"
            )

        def values(part: Tokens, _: TrunkStates | None) -> Tensor:
            states = self.policy.forward(part).states if self.critic.reads_states else None
            return self.critic.values(part, states)

        tokens = self._pairs(prompts, responses).tokens
        packed = self.critic.packed and (self.policy.packed or not self.critic.reads_states)
        return in_batches(values, tokens, None, self.config.forward_batch_tokens, packed=packed)

    def get_logprobs(
        self,
        prompts: Sequence[Any],
        responses: Sequence[str],
        temperature: float | None = None,
    ) -> Tensor:
        """Compute log-probs [B, T] of the response tokens under the current policy."""
        return self._logprobs(self.policy, prompts, responses, temperature)

    def get_reference_logprobs(
        self,
        prompts: Sequence[Any],
        responses: Sequence[str],
        temperature: float | None = None,
    ) -> Tensor:
        """Compute log-probs [B, T] of the response tokens under the reference."""
        return self._logprobs(self.reference, prompts, responses, temperature)

    @without_cudnn_attention()
    @torch.no_grad()
    def _logprobs(
        self,
        model: LanguageModel,
        prompts: Sequence[Any],
        responses: Sequence[str],
        temperature: float | None,
    ) -> Tensor:
        tokens, _, sampled = self._pairs(prompts, responses)
        t = self.config.temperature if temperature is None else temperature
        if temperature is None and sampled and self.last_rollout is not None:
            t = self.last_rollout.sampling.temperature
        with model.resident():
            return in_batches(
                lambda part, _: model.logprobs(model.forward(part), part, temperature=t).logprobs,
                tokens,
                None,
                self.config.forward_batch_tokens,
                packed=model.packed,
            )

    def _pairs(self, prompts: Sequence[Any], responses: Sequence[str]) -> Pairs:
        """Return the tokens of pairs of texts: as they were sampled last, else encoded."""
        pairs = self.texts.pairs(prompts, responses, self.last_rollout, self.device)
        limit = context_limit({"policy_model": self.policy.model, **self._readers()})
        check_lengths(pairs.tokens.lengths.tolist(), limit)
        return pairs
