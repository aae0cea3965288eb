"""Step: results of one step of PPO."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ppo_fast.data.experience import Experience
from ppo_fast.data.rollout import Rollout


@dataclass(frozen=True)
class Step:
    """Results of a step, for callbacks.

    number: steps so far, this one included.
    metrics: plain floats; see ``PPO.step``.
    rollout: the sampled responses, without trunk states and states, which are large.
    scores: [B] float32, the reward of each sequence before KL.
    rewards: of each reward and of each part of one, by name: [B] float32 on the CPU, before
        weights; NaN where a reward does not judge the response.
    per_token: numbers of each response token, [B, T] float32 on the CPU, 0 beyond a response:
        "log_ratio" (log policy - log reference), "advantage" (as the update used it) and, with a
        value function, "value".
    """

    number: int
    metrics: dict[str, float]
    rollout: Rollout
    scores: Tensor
    rewards: dict[str, Tensor] = field(default_factory=dict)
    per_token: dict[str, Tensor] = field(default_factory=dict)


def token_numbers(experience: Experience, *, valued: bool) -> dict[str, Tensor]:
    """Return a step's ``per_token``.

    Args:
        experience: of the step.
        valued: whether a value function gave its values.
    """
    numbers = {
        "log_ratio": experience.old_logprobs - experience.ref_logprobs,
        "advantage": experience.advantages,
    }
    if valued:
        numbers["value"] = experience.values
    return {name: number.float().cpu() for name, number in numbers.items()}
