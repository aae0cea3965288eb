"""The specification of ``linear_logprobs``, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ppo_fast.ops.gradient import without_autocast
from ppo_fast.ops.logprobs import TokenLogprobs, logprobs_from_logits


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    entropy: bool,
) -> TokenLogprobs:
    """Compute log-probs from the whole [..., V]; formulas as in the public function."""
    # Masked rows are zeroed before the product: 0 * NaN would reach the gradient of the weight.
    if mask is not None:
        hidden = hidden.masked_fill(~mask.unsqueeze(-1), 0.0)
    logits = _head_logits(hidden, weight, bias, logit_scale, softcap)
    return logprobs_from_logits(
        logits, labels, mask=mask, temperature=temperature, entropy=entropy, impl="reference"
    )


def _head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    with without_autocast(hidden.device):
        bias = bias.to(dtype) if bias is not None else None
        logits = F.linear(hidden.to(dtype), weight.to(dtype), bias)
        if logit_scale != 1.0:
            logits = logits * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
    return logits
