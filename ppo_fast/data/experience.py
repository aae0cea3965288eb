"""Experience: the input of an update, and the rows of one of its batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ppo_fast.data.tokens import Tokens
from ppo_fast.data.trunk_states import TrunkStates


class Moments(NamedTuple):
    """Number of some scores, their mean, and the sum of squared deviations from it."""

    number: float
    mean: float
    squares: float


@dataclass(frozen=True)
class Experience:
    """Input of an update. Legend: B sequences, P prompt and T response tokens, D hidden size.

    Everything [B, T] is float32 and 0 beyond a response.

    tokens: the ids and their masks.
    temperature: divides logits in every log-prob.
    max_length: max tokens of a response.
    old_logprobs: [B, T], the denominator of ratios: of the policy that sampled, or the sampler's.
    ref_logprobs: [B, T], of the reference.
    values: [B, T], of the state before each token, by the old value function.
    scores: [B], each sequence's score, as the reward gave it.
    rewards: [B, T], the shaped scores, each on its token (a sequence's on its last), less the KL
        penalty where it is in the reward.
    advantages: [B, T], as the update uses them (whitened where the config says so).
    returns: [B, T], the value function's targets, from unwhitened advantages.
    trunk_states: the trunk states; None without a trunk.
    metrics: plain numbers for the log.
    weights: [B, T], importance weights of the policy loss; None: all 1.
    high_entropy: [B, T] bool, tokens that get the entropy bonus; None: all.
    reward_moments: of all scores so far, with this batch's; None where they are not kept.
    """

    tokens: Tokens
    temperature: float
    max_length: int
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    trunk_states: TrunkStates | None
    metrics: dict[str, float]
    weights: Tensor | None = None
    high_entropy: Tensor | None = None
    reward_moments: Moments | None = None


@dataclass(frozen=True)
class Batch:
    """Some rows of an Experience, [b, t] each, without columns that are padding in all of them."""

    tokens: Tokens
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    trunk_states: TrunkStates | None
    weights: Tensor | None = None
    high_entropy: Tensor | None = None


def select(experience: Experience, rows: Tensor) -> Batch:
    """Select ``rows`` (int64 on the CPU) of ``experience``."""
    tokens = experience.tokens.select(rows)
    index, width = rows.to(tokens.device), tokens.response_ids.shape[1]

    def part(x: Tensor) -> Tensor:
        return x[index, :width]

    return Batch(
        tokens,
        part(experience.old_logprobs),
        part(experience.ref_logprobs),
        part(experience.values),
        part(experience.advantages),
        part(experience.returns),
        None if experience.trunk_states is None else experience.trunk_states.select(rows),
        None if experience.weights is None else part(experience.weights),
        None if experience.high_entropy is None else part(experience.high_entropy),
    )
