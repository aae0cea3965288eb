"""Rollout: what was sampled, ready to be scored and trained on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ppo_fast.rollout.decode import Sampling
from ppo_fast.tokens import Tokens


@dataclass(frozen=True)
class Rollout:
    """Sampled responses. Legend: B sequences, T response tokens.

    tokens: the ids, and all masks by their lengths.
    logprobs: [B, T] float32, of the tokens under softmax(logits / temperature), 0 beyond a
        response.
    sampling_logprobs: [B, T] float32, under the distribution really drawn from.
    finished: [B] bool on the CPU, whether a response ended with EOS.
    sampling: how they were drawn.
    trunk: [B, P + T, D], the activations of the policy's frozen trunk, as decoding computed them;
        None without a trunk.
    prompts, completions: B texts, for reward functions and for reading; never tokenised again.
    """

    tokens: Tokens
    logprobs: Tensor
    sampling_logprobs: Tensor
    finished: Tensor
    sampling: Sampling
    trunk: Tensor | None
    prompts: list[str]
    completions: list[str]
