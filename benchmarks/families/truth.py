"""The truth: a plain transformers model in float64, one row at a time, without padding or cache."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from ppo_fast.data.tokens import Tokens


def plain_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the logits [L, V] of one row of tokens [L]."""
    try:
        return model(input_ids=ids[None], use_cache=False).logits[0]
    except TypeError:
        return model(input_ids=ids[None]).logits[0]


def in_float64(model: nn.Module) -> nn.Module:
    """Return a copy that computes in float64, or in float32 where it cannot, in eval mode."""
    copy = deepcopy(model).double().eval()
    try:
        with torch.no_grad():
            plain_logits(copy, torch.arange(2, 6))
    except (RuntimeError, ValueError):
        copy = deepcopy(model).eval()
    return copy


def true_logprobs(model: nn.Module, tokens: Tokens) -> Tensor:
    """Compute log-probs [B, T] of the response tokens, 0 beyond a response; with gradient."""
    rows = []
    for ids, p in zip(tokens.sequences(), tokens.prompt_lengths.tolist(), strict=True):
        logprobs = plain_logits(model, ids)[p - 1 : -1].double().log_softmax(-1)
        row = logprobs.gather(1, ids[p:, None]).squeeze(1)
        rows.append(nn.functional.pad(row, (0, tokens.response_ids.shape[1] - len(row))))
    return torch.stack(rows)
