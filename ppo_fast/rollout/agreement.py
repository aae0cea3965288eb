"""Check, before any training, that decoding and the update compute the same log-probs."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ppo_fast.data.rollout import Rollout
from ppo_fast.data.sampling import Sampling
from ppo_fast.models.checks import context_limit
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.patching import uncompiled
from ppo_fast.models.precision import HALF_TOLERANCE, WeightCopies
from ppo_fast.models.transformers_internals import windows
from ppo_fast.rollout.decode import decode

logger = logging.getLogger(__name__)

# Lengths differ, so that rows end at different places; one is decoded after others have ended.
# Ids are those of no special tokens: some models count positions without padding.
PROMPTS = ((11, 15, 12, 17, 13), (14,), (12, 18, 15), (13, 16, 11))
NEW_TOKENS = 3
MOST_MEAN_DIFFERENCE_HALF = 0.5
LONGEST = 64  # tokens; a wider window is not crossed


@torch.no_grad()
def check_agreement(policy: LanguageModel, pad_id: int, *, int8: bool = False) -> bool:
    """Compare log-probs of a tiny rollout with those of passes as in the update.

    Rows are compared beside others, padded, and alone. They are longer than the windows of the
    model's attention where these are small. With ``int8``, weights in int8 are tried after.

    Returns:
        Whether decoding can compute with ``WeightCopies``; if not, it needs autocast.

    Raises:
        ValueError: they differ by more than rounding explains, or no weight can be in int8.
    """
    prompts = _prompts(policy)
    if not prompts:
        return True
    copies_work = True
    try:
        rollout = _rollout(policy, prompts, pad_id, WeightCopies(policy.compute_dtype))
    except RuntimeError as error:  # float32 buffers meet half-precision weights
        if policy.compute_dtype is None or isinstance(error, torch.OutOfMemoryError):
            raise
        logger.info(
            "decoding casts weights at every step, which takes longer: copies of them in %s do not "
            "fit %s (%s)",
            policy.compute_dtype,
            type(policy.model).__name__,
            error,
        )
        copies_work = False
        copies = WeightCopies(policy.compute_dtype, autocast=True)
        rollout = _rollout(policy, prompts, pad_id, copies)
    sampled, batch = rollout.logprobs, _logprobs(policy, rollout)
    assert sampled is not None
    rows = [torch.tensor([i], device="cpu") for i in range(len(prompts))]
    alone = torch.cat([_logprobs(policy, rollout, row) for row in rows])
    mask = rollout.tokens.response_mask
    scale = alone[mask].abs().max().clamp(min=1.0)
    padded = "in one pass over a row alone, and over it in a padded batch"
    for found, tolerance, words in (
        (batch, policy.decoding_tolerance, padded),
        (sampled, policy.cache_tolerance, "in decoding, and in one pass over all tokens"),
    ):
        differences = (found - alone)[mask].abs()
        difference = float(differences.max() / scale)
        fits = difference <= 2 * tolerance
        if tolerance >= HALF_TOLERANCE:  # rounding may send a token to another expert
            fits = float(differences.mean()) <= MOST_MEAN_DIFFERENCE_HALF
        if not fits:
            raise ValueError(
                f"policy_model: {type(policy.model).__name__} computes other log-probs {words}: "
                f"they differ by {difference:.1e} of their size, so that what is sampled would not "
                "be what is trained"
            )
    if int8:
        copies = WeightCopies(policy.compute_dtype, autocast=not copies_work)
        _rollout(policy, prompts, pad_id, copies, int8=True)
    return copies_work


def _rollout(
    policy: LanguageModel,
    prompts: list[list[int]],
    pad_id: int,
    copies: WeightCopies,
    *,
    int8: bool = False,
) -> Rollout:
    arguments: dict[str, Any] = {"eos_ids": [], "pad_id": pad_id, "slots": 2, "int8": int8}
    seeds = torch.arange(len(prompts), device="cpu")
    with copies.in_use(policy.model), uncompiled(policy.model):
        return decode(policy, prompts, Sampling(NEW_TOKENS), seeds=seeds, **arguments)


def _prompts(policy: LanguageModel) -> list[list[int]]:
    limit = context_limit({"policy_model": policy.model})
    most = (limit.tokens if limit else LONGEST) - NEW_TOKENS
    rows = [list(row) for row in PROMPTS if len(row) <= most]
    lengths = [window + 2 for window in windows(policy.text_config) if window + 2 <= LONGEST]
    if lengths and max(lengths) <= most:
        rows.append([13 + i % 7 for i in range(max(lengths))])
    return [[token % policy.vocab_size for token in row] for row in rows]


def _logprobs(policy: LanguageModel, rollout: Rollout, rows: Tensor | None = None) -> Tensor:
    """Return log-probs [n, T] of all rows, or of one, as the update computes them."""
    tokens = rollout.tokens if rows is None else rollout.tokens.select(rows)
    states = None if policy.split is None else policy.compute_trunk_states(tokens)
    found = policy.logprobs(policy.forward(tokens, states), tokens, temperature=1.0).logprobs
    return torch.nn.functional.pad(found, (0, NEW_TOKENS - found.shape[1]))
