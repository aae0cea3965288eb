"""Draw the next token of each sequence."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ppo_fast.data.sampling import Sampling
from ppo_fast.nonfinite import NotFiniteError
from ppo_fast.ops import Sampled, logprobs_from_logits, sample_tokens

NOT_FINITE = (
    "policy_model: its logits were NaN or infinite while it sampled; look at its weights (was the "
    "learning rate too high?) and at its dtype"
)


def draw(
    logits: Tensor, seeds: Tensor, positions: Tensor, sampling: Sampling, ends: Tensor
) -> Sampled:
    """Draw one token a row; before ``min_new_tokens``, among tokens that end nothing.

    Args:
        logits: [n, V].
        seeds: [n] int64, of the sequences.
        positions: [n] int64, in the responses.
        sampling: how to draw.
        ends: [V] bool, whether a token ends a response.

    Raises:
        NotFiniteError: logits are NaN or infinite (found on the CPU alone).
    """
    s, drawn_from = sampling, logits
    if s.min_new_tokens > 0:
        early = positions < s.min_new_tokens
        drawn_from = logits.masked_fill(early[:, None] & ends, -torch.inf)
    sample = partial(sample_tokens, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)
    try:
        sampled = sample(drawn_from, seeds, positions)
    except ValueError as error:
        raise NotFiniteError(NOT_FINITE) from error
    if drawn_from is logits:
        return sampled
    full = logprobs_from_logits(logits, sampled.tokens, temperature=s.temperature, entropy=False)
    return sampled._replace(logprobs=full.logprobs)
