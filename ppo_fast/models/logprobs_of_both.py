"""Log-probs of a policy and its reference, which have a trunk in common."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.data.tokens import Tokens
from ppo_fast.data.trunk_states import TrunkStates
from ppo_fast.models.language_model import Forward, LanguageModel


def logprobs_of_both(
    one: LanguageModel,
    other: LanguageModel,
    tokens: Tokens,
    trunk_states: TrunkStates | None,
    *,
    temperature: float,
) -> Tensor:
    """Compute log-probs [2, B, T] of two models that have the trunk in common.

    If they share the LM head too, it is read once, for the rows of both.
    """
    forwards = [model.forward(tokens, trunk_states) for model in (one, other)]
    if not one.shares_head_with(other):
        pairs = zip((one, other), forwards, strict=True)
        return torch.stack(
            [m.logprobs(f, tokens, temperature=temperature).logprobs for m, f in pairs]
        )
    states = torch.cat([forward.states for forward in forwards])  # type: ignore[misc]
    stacked = one.logprobs(Forward(states, None), tokens.repeated(2), temperature=temperature)
    return stacked.logprobs.unflatten(0, (2, len(tokens)))
