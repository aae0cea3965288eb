"""Float64 formulas for the log-prob ops, and the error budget that implementations are held to."""

from __future__ import annotations

import torch
from runnable import TRITON
from torch import Tensor


def distribution(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return p and log p of float64 logits, by the definition with the maximum subtracted."""
    shifted = x - x.amax(-1, keepdim=True)
    total = shifted.exp().sum(-1, keepdim=True)
    return shifted.exp() / total, shifted - total.log()


def row_entropy(x: Tensor) -> Tensor:
    p, log_p = distribution(x)
    return -torch.where(p > 0, p * log_p, 0.0).sum(-1)


def true_logprobs(logits: Tensor, labels: Tensor, mask: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """l and H in float64, 0 where masked."""
    x, y = _clean(logits, labels, mask, t)
    _, log_p = distribution(x)
    l = torch.where(mask, log_p.gather(-1, y[..., None])[..., 0], 0.0)  # noqa: E741
    return l, torch.where(mask, row_entropy(x), 0.0)


def true_logit_grad(
    logits: Tensor, labels: Tensor, mask: Tensor, t: float, a: Tensor, b: Tensor
) -> Tensor:
    """(1/t) * [a * (1[j = y] - p_j) - b * p_j * (log p_j + H)] in float64, 0 where masked."""
    x, y = _clean(logits, labels, mask, t)
    p, log_p = distribution(x)
    a, b = (torch.where(mask, c.double(), 0.0)[..., None] for c in (a, b))
    hot = torch.zeros_like(p).scatter(-1, y[..., None], 1.0)
    surprise = torch.where(p > 0, p * (log_p + row_entropy(x)[..., None]), 0.0)
    return (a * (hot - p) - b * surprise) / t


def _clean(logits: Tensor, labels: Tensor, mask: Tensor, t: float) -> tuple[Tensor, Tensor]:
    x = torch.where(mask[..., None], logits.detach().double(), 0.0) / t
    return x, torch.where(mask, labels, 0)


def assert_within_budget(
    got: Tensor, eager: Tensor, truth: Tensor, allowance: Tensor | float = 0.0
) -> None:
    """Assert err(got) <= 2 * err(eager) + a few eps, and half an ulp more for half precision.

    ``allowance``: additional error allowed, per element.
    """
    assert got.shape == truth.shape
    if truth.numel() == 0:
        return
    got64, eager64 = got.detach().double(), eager.detach().double()
    work = torch.float64 if eager.dtype == torch.float64 else torch.float32
    scale = truth.abs().amax().clamp(min=1.0)
    few = 8 if work == torch.float64 else 4  # the truth in float64 has rounding errors too
    budget = 2 * (eager64 - truth).abs().amax() + few * torch.finfo(work).eps * scale
    stored = rounding(truth, got.dtype) + allowance
    error = (got64 - truth).abs()
    assert (error <= budget + stored).all(), f"{error.amax():.3g} over a budget of {budget:.3g}"


def rounding(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the max rounding error of each element in half precision; 0 for other dtypes."""
    if dtype not in (torch.bfloat16, torch.float16):
        return torch.zeros_like(truth)
    info = torch.finfo(dtype)
    # Triton's interpreter truncates to bfloat16.
    ulps = 1.0 if TRITON and not truth.is_cuda else 0.5
    return truth.abs() * info.eps * ulps * 1.01 + info.smallest_normal * info.eps
