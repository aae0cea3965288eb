"""Rollout: sampled responses, ready to be scored and trained on."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from torch import Tensor

from ppo_fast.data.sampling import Sampling
from ppo_fast.data.tokens import Tokens
from ppo_fast.data.trunk_states import TrunkStates


@dataclass(frozen=True)
class Rollout:
    """Sampled responses. Legend: B sequences, P prompt and T response tokens, D hidden size.

    tokens: the ids, and all masks by their lengths.
    logprobs: [B, T] float32, of the tokens under softmax(logits / temperature), 0 beyond a
        response; None: the engine does not know them.
    sampling_logprobs: [B, T] float32, under the distribution that was drawn from.
    finished: [B] bool on the CPU, whether a response ended by itself, not at its max length.
    sampling: how they were drawn.
    trunk_states: those of the policy, as decoding computed them; None without a trunk. Each row's
        last token has 0 unless they are ``whole``: no log-prob needs it, but a RewardModel that
        shares the trunk does.
    states: [B, T, D], inputs of the policy's LM head before each token, 0 beyond a response; None
        where they were not asked for, or the model gives logits alone.
    prompts, completions: B texts, for reward functions and for reading; never tokenised again.
    """

    tokens: Tokens
    logprobs: Tensor | None
    sampling_logprobs: Tensor
    finished: Tensor
    sampling: Sampling
    trunk_states: TrunkStates | None = None
    states: Tensor | None = None
    prompts: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)


def sampled_ids(
    rollout: Rollout | None,
) -> dict[tuple[str, str], list[tuple[list[int], list[int]]]]:
    """Return the ids (of prompt, of response) of a rollout by (prompt, completion)."""
    found = defaultdict(list)
    if rollout is not None:
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
