"""What ops with a gradient of their own share: operands of one dtype, a loss that knows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """What the maths on operands of ``dtype`` is done in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``; where that changes nothing it still costs 2 us, felt by small ops."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def constant(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, cut off from its gradient."""
    return as_dtype(tensor.detach() if tensor.requires_grad else tensor, dtype)


def constant_or_none(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The same for a tensor that may be missing."""
    return None if tensor is None else constant(tensor, dtype)


def with_gradients(loss: Tensor, gradients: Tensor, *inputs: Tensor | None) -> Tensor:
    """``loss`` (0-dim), with ``gradients`` [N, ...] as its derivatives in the first N ``inputs``.

    The others get none. Backward multiplies them with the upstream gradient, all at once.
    """
    return _WithGradients.apply(loss, gradients, *inputs)


class _WithGradients(torch.autograd.Function):
    # The context is an argument of ``forward``: with ``setup_context`` a call takes 90 us more.
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.num_inputs = len(inputs)
        ctx.save_for_backward(gradients)
        return loss.clone()  # an output that is an input would be a view, not to be changed

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # The decorator, 16 us a call, is for create_graph=True alone: a derivative of what this
        # returns would be wrong, and is refused.
        run = once_differentiable(_multiply) if torch.is_grad_enabled() else _multiply
        return run(ctx, grad_loss)


def _multiply(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    (gradients,) = ctx.saved_tensors
    grads = (gradients * grad_loss).unbind()
    return None, None, *grads, *(None,) * (ctx.num_inputs - len(grads))
