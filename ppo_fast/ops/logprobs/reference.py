"""The specification of ``logprobs_from_logits``, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logprobs_from_logits(
    logits: Tensor, labels: Tensor, *, mask: Tensor | None, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute log-prob and entropy of each token; see the public function for the formulas."""
    # Masked rows are replaced before any arithmetic: a NaN in them would survive a product with 0.
    if mask is not None:
        logits = logits.masked_fill(~mask.unsqueeze(-1), 0.0)
        labels = labels.masked_fill(~mask, 0)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        logits = logits / temperature
    log_p = logits.log_softmax(dim=-1)
    logprobs = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    entropies = _entropy(log_p) if entropy else None
    if mask is not None:
        logprobs = logprobs.masked_fill(~mask, 0.0)
        entropies = entropies.masked_fill(~mask, 0.0) if entropies is not None else None
    return logprobs, entropies


def _entropy(log_p: Tensor) -> Tensor:
    # Where p = 0 the term is 0, not 0 * -inf, and neither factor gets a gradient.
    finite = log_p.masked_fill(log_p == -math.inf, 0.0)
    return -(log_p.exp() * finite).sum(dim=-1)
