"""Experience: the input of an update, and the rows of one of its batches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ppo_fast.data.batches import select_trunk
from ppo_fast.data.tokens import Tokens
from ppo_fast.data.trunk_states import TrunkStates


@dataclass(frozen=True)
class Experience:
    """Input of an update. Legend: B sequences, P prompt and T response tokens, D hidden size.

    Everything [B, T] is float32 and 0 beyond a response.

    tokens: the ids and their masks.
    temperature: divides logits in every log-prob.
    old_logprobs, ref_logprobs: [B, T], of the policy that sampled and of the reference.
    values: [B, T], of the state before each token, by the old value function.
    scores: [B], one per sequence, before KL.
    rewards: [B, T], the score on the last token, less the KL penalty where it is in the reward.
    advantages: [B, T], as the update uses them (whitened where the config says so).
    returns: [B, T], the value function's targets, from unwhitened advantages.
    trunk_states: the trunk states; None without a trunk.
    metrics: plain numbers for the log.
    """

    tokens: Tokens
    temperature: float
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    trunk_states: TrunkStates | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class Batch:
    """Some rows of an Experience, [b, t] each, without columns that are padding in all of them."""

    tokens: Tokens
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    trunk_states: Tensor | None


def select(experience: Experience, rows: Tensor) -> Batch:
    """Select ``rows`` (int64 on the CPU) of ``experience``."""
    tokens = experience.tokens.select(rows)
    index, width = rows.to(tokens.device), tokens.response_ids.shape[1]
    return Batch(
        tokens,
        experience.old_logprobs[index, :width],
        experience.ref_logprobs[index, :width],
        experience.values[index, :width],
        experience.advantages[index, :width],
        experience.returns[index, :width],
        select_trunk(experience.trunk_states, experience.tokens, rows),
    )
