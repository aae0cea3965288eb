"""The single calculations that users of the classic PPOTrainer interface call by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ppo_fast import checks
from ppo_fast.config import PPOConfig
from ppo_fast.critics.critic import Critic
from ppo_fast.data.tokens import Tokens, make_tokens
from ppo_fast.learning.make_experience import in_batches
from ppo_fast.models.attention import without_cudnn_attention
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.ops import gae, ppo_loss
from ppo_fast.rewards.score import RewardFunction, score
from ppo_fast.rollout import Rollout


class SpecMethods:
    """The formulas, and what they need of texts. Tensors [B, T] are 0 beyond a response.

    Pairs of texts that came from the last ``generate_responses`` (or ``rollout``) stand for the
    very tokens that were sampled, and their log-probs are at its temperature unless another is
    given; other responses are encoded without special tokens and get no
    EOS.
    """

    # what PPOTrainer has
    config: PPOConfig
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    policy: LanguageModel
    reference: LanguageModel
    critic: Critic | None
    policy_model: nn.Module
    reward_model: nn.Module | RewardFunction
    rollout: Callable[..., Rollout]
    last_rollout: Rollout | None

    # the numbers by the names of the classic interface; they are the config's and do not change
    clip_epsilon = property(lambda self: self.config.clip_epsilon)
    kl_penalty = property(lambda self: self.config.kl_penalty)
    gamma = property(lambda self: self.config.gamma)
    gae_lambda = property(lambda self: self.config.gae_lambda)
    value_loss_coef = property(lambda self: self.config.value_loss_coef)
    max_grad_norm = property(lambda self: self.config.max_grad_norm)

    def compute_gae(
        self, rewards: Tensor, values: Tensor, dones: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(advantages, returns), [B, T] each: GAE with the trainer's gamma and lambda
        (Schulman et al. 2016, eq. 16). ``dones`` [B, T]: the episode ends with that step."""
        result = gae(
            rewards,
            values,
            dones=None if dones is None else dones.bool(),
            gamma=self.config.gamma,
            lam=self.config.gae_lambda,
        )
        return result.advantages, result.returns

    def compute_kl_divergence(self, current_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
        """The mean of current - reference, a 0-dim tensor."""
        return (current_logprobs - reference_logprobs).mean()

    def compute_ppo_loss(
        self, old_logprobs: Tensor, new_logprobs: Tensor, advantages: Tensor
    ) -> Tensor:
        """The clipped loss, a 0-dim tensor: -mean(min(ratio A, clip(ratio) A)) with ratio =
        exp(new - old) (Schulman et al. 2017, eq. 7)."""
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
        prompts: Sequence[str],
        max_length: int | None = None,
        temperature: float | None = None,
    ) -> tuple[list[str], Tensor]:
        """(responses, their log-probs [B, T]), sampled from the current policy; ``max_length``
        (150) counts response tokens, ``temperature`` is 1.0 by default."""
        rollout = self.rollout(prompts, max_length, temperature)
        known = rollout.sampling_logprobs if rollout.logprobs is None else rollout.logprobs
        return rollout.completions, known

    @without_cudnn_attention()
    def compute_rewards(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """[B, T]: the reward model's score on each response's last token, 0 elsewhere."""
        tokens = self._pairs(prompts, responses)
        scores = score(
            self.reward_model,
            tokens,
            list(prompts),
            list(responses),
            budget=self.config.forward_batch_tokens,
        )
        last = (tokens.response_lengths - 1).to(self.device)
        rewards = torch.zeros(tokens.response_ids.shape, device=self.device)
        return rewards.scatter(1, last[:, None], scores[:, None])

    @without_cudnn_attention()
    @torch.no_grad()
    def compute_values(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """[B, T]: the value of the state before each response token.

        Raises:
            ValueError: the trainer has no value function (critic="baseline").
        """
        critic = self.critic
        if critic is None:
            raise ValueError(
                "compute_values: critic='baseline' has no value function; pass a value_model or "
                "config=PPOConfig(critic='head')"
            )

        def values(part: Tokens, _: Tensor | None) -> Tensor:
            states = self.policy.forward(part).states if critic.reads_states else None
            return critic.values(part, states)

        tokens = self._pairs(prompts, responses)
        return in_batches(values, tokens, None, self.config.forward_batch_tokens)

    def get_logprobs(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        temperature: float | None = None,
    ) -> Tensor:
        """[B, T]: log-probs of the response tokens under the current policy."""
        return self._logprobs(self.policy, prompts, responses, temperature)

    def get_reference_logprobs(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        temperature: float | None = None,
    ) -> Tensor:
        """[B, T]: log-probs of the response tokens under the reference."""
        return self._logprobs(self.reference, prompts, responses, temperature)

    @without_cudnn_attention()
    @torch.no_grad()
    def _logprobs(
        self,
        model: LanguageModel,
        prompts: Sequence[str],
        responses: Sequence[str],
        temperature: float | None,
    ) -> Tensor:
        tokens = self._pairs(prompts, responses)
        t = self.config.temperature if temperature is None else temperature
        if temperature is None and self.last_rollout is not None:
            sampled = self._sampled_ids()
            if all(pair in sampled for pair in zip(prompts, responses, strict=True)):
                t = self.last_rollout.sampling.temperature
        return in_batches(
            lambda part, _: model.logprobs(model.forward(part), part, temperature=t).logprobs,
            tokens,
            None,
            self.config.forward_batch_tokens,
        )

    def _pairs(self, prompts: Sequence[str], responses: Sequence[str]) -> Tokens:
        """The tokens of pairs of texts: those sampled last where they are, else encoded."""
        prompts = checks.check_prompts(prompts)
        if len(prompts) != len(responses):
            raise ValueError(
                f"responses: got {len(responses)}, expected {len(prompts)}, one a prompt"
            )
        sampled = self._sampled_ids()
        prompt_ids, response_ids = [], []
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            if rows := sampled.get((prompt, response)):
                # the same pair may have been sampled twice, from different tokens
                pair = rows.pop(0) if len(rows) > 1 else rows[0]
            else:
                encoded = self.tokenizer(response, add_special_tokens=False)["input_ids"]
                pair = (self.tokenizer(prompt)["input_ids"], encoded)
            if not pair[1]:
                raise ValueError(
                    f"responses[{i}]: {response!r} is empty after tokenisation; a response has at "
                    "least one token"
                )
            prompt_ids.append(pair[0])
            response_ids.append(pair[1])
        limit = checks.context_limit(self.policy_model)
        longest = max(len(p) + len(r) for p, r in zip(prompt_ids, response_ids, strict=True))
        if limit is not None and longest > limit:
            raise ValueError(
                f"prompts and responses: the longest pair has {longest} tokens, more than the "
                f"model's context of {limit}"
            )
        checks.check_prompt_ids(prompts, prompt_ids, 0, limit)
        return make_tokens(prompt_ids, response_ids, self.tokenizer.pad_token_id, self.device)

    def _sampled_ids(
        self,
    ) -> dict[tuple[str, str], list[tuple[list[int], list[int]]]]:
        """The ids of the last rollout by (prompt, completion)."""
        found = defaultdict(list)
        if (rollout := self.last_rollout) is not None:
            rows = zip(
                rollout.prompts,
                rollout.completions,
                rollout.tokens.sequences(),
                rollout.tokens.prompt_lengths.tolist(),
                strict=True,
            )
            for prompt, completion, ids, n in rows:
                found[prompt, completion].append((ids[:n].tolist(), ids[n:].tolist()))
        return dict(found)
