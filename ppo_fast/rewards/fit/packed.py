"""Rewards of preference pairs in packed passes: what both responses begin with is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ppo_fast.data.tokens import Tokens, make_tokens
from ppo_fast.models.heads import RewardModel, classifier_parts
from ppo_fast.models.passes import Passes, head_passes, passes_of, probe_packed_tokens
from ppo_fast.models.precision import computing_in, tolerance
from ppo_fast.models.probe import relative_difference
from ppo_fast.rewards.encoding import Row
from ppo_fast.rewards.fit.model import head_in_its_dtype


class PackedRewards(NamedTuple):
    """A reward model: the packed passes of its body, and the head that reads their last states."""

    passes: Passes
    head: nn.Module

    def __call__(self, chosen: Sequence[Row], rejected: Sequence[Row]) -> Tensor:
        """Compute the rewards [2, n] float32 of n pairs."""
        tokens = pair_tokens(chosen, rejected, next(self.head.parameters()).device)
        return self.of(tokens).view(2, -1)

    def of(self, tokens: Tokens) -> Tensor:
        """Compute the rewards [B] float32 of sequences."""
        return self.head(self.passes.states(tokens, last=True).last(tokens))[..., 0].float()


def packed_rewards(model: nn.Module, dtype: torch.dtype | None) -> PackedRewards | None:
    """Return the packed passes of a reward model that computes in ``dtype``, or None.

    A classifier of transformers has them where the head on the last token's state gives its logits.
    """
    if isinstance(model, RewardModel):
        passes = head_passes(model, compute_dtype=dtype)
        return PackedRewards(passes, model.reward_head) if passes and passes.packed else None
    try:
        body, head = classifier_parts(model)
    except (TypeError, ValueError):
        return None
    passes = passes_of(body, None, compute_dtype=dtype, padding_free=True)
    found = PackedRewards(passes, head)
    return found if passes.packed and _is_the_model(found, model, dtype) else None


@torch.no_grad()
def _is_the_model(rewards: PackedRewards, model: nn.Module, dtype: torch.dtype | None) -> bool:
    tokens = probe_packed_tokens(rewards.passes.module)
    weight = next(model.parameters())
    with computing_in(dtype, weight.device), head_in_its_dtype(model, weight.device):
        logits = [model(input_ids=ids[None]).logits[0] for ids in tokens.sequences()]
        expected = torch.cat(logits).float()
        found = rewards.of(tokens)
    limit = tolerance(dtype or weight.dtype, weight.device)
    return found.shape == expected.shape and relative_difference(found, expected) <= limit


def pair_tokens(chosen: Sequence[Row], rejected: Sequence[Row], device: torch.device) -> Tokens:
    """Return n chosen and then n rejected sequences; the prompt is what both of a pair begin with.

    The last token of either is not in the prompt.
    """
    sides = [[row["input_ids"] for row in side] for side in (chosen, rejected)]
    prompts, responses = [], []
    for one, other in zip(*sides, strict=True):
        both = zip(one[:-1], other[:-1], strict=False)
        prompts.append(one[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))])
    for side in sides:
        responses += [ids[len(p) :] for ids, p in zip(side, prompts, strict=True)]
    return make_tokens(prompts * 2, responses, 0, device)
