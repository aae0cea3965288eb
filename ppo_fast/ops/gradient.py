"""Helpers of ops that compute their own gradients: dtypes, and a loss with given gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of arithmetic on ``dtype`` operands: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor.to(dtype)``; without that call, 2 us, where the dtype already fits."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def constant(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor`` in ``dtype``, detached from the autograd graph."""
    return as_dtype(tensor.detach() if tensor.requires_grad else tensor, dtype)


def constant_or_none(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return ``constant(tensor, dtype)``, or None for None."""
    return None if tensor is None else constant(tensor, dtype)


def with_gradients(loss: Tensor, gradients: Tensor, *inputs: Tensor | None) -> Tensor:
    """Return ``loss`` (0-dim) with derivatives ``gradients`` [N, ...] in the first N ``inputs``.

    The other inputs get no gradient. Backward multiplies all ``gradients`` with the upstream
    gradient at once.
    """
    return _WithGradients.apply(loss, gradients, *inputs)


class _WithGradients(torch.autograd.Function):
    # The context is an argument of ``forward``: with ``setup_context`` a call takes 90 us more.
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.num_inputs = len(inputs)
        ctx.save_for_backward(gradients)
        return loss.clone()  # an input as output would be a view, which cannot be changed in place

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # Only create_graph=True needs the decorator, 16 us a call: it refuses a second derivative,
        # which would be wrong.
        run = once_differentiable(_multiply) if torch.is_grad_enabled() else _multiply
        return run(ctx, grad_loss)


def _multiply(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    (gradients,) = ctx.saved_tensors
    grads = (gradients * grad_loss).unbind()
    return None, None, *grads, *(None,) * (ctx.num_inputs - len(grads))
