"""Helpers of ops that compute their own gradients: dtypes, and a loss with given gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of arithmetic on ``dtype`` operands: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> torch.autocast | nullcontext[None]:
    """Within the block, autocast is off: it would compute products in half precision."""
    if device.type == "meta":  # no autocast; asking torch for it does not compile in PyTorch 2.8
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor.to(dtype)``, without that call where the dtype already fits."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def constant(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor`` in ``dtype``, detached from the autograd graph."""
    return as_dtype(tensor.detach() if tensor.requires_grad else tensor, dtype)


def constant_or_none(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return ``constant(tensor, dtype)``, or None for None."""
    return None if tensor is None else constant(tensor, dtype)


def with_gradients(op: str, loss: Tensor, gradients: Tensor, *inputs: Tensor | None) -> Tensor:
    """Return ``loss`` (0-dim) of ``op`` with derivatives ``gradients`` [N, ...] in N ``inputs``.

    The inputs after the first N get no gradient. Backward multiplies all ``gradients`` with the
    upstream gradient at once.
    """
    return _WithGradients.apply(op, loss, gradients, *inputs)


class _WithGradients(torch.autograd.Function):
    # The context is an argument of ``forward``: a call with ``setup_context`` is slower.
    @staticmethod
    def forward(
        ctx: Any, op: str, loss: Tensor, gradients: Tensor, *inputs: Tensor | None
    ) -> Tensor:
        ctx.op = op
        # the inputs for differentiated_once, which looks for them among the saved tensors
        ctx.save_for_backward(gradients, *inputs)
        return loss.clone()  # an input as output would be a view, which cannot be changed in place

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return differentiated_once(ctx.op)(_multiply)(ctx, grad_loss)


def _multiply(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    gradients, *inputs = ctx.saved_tensors
    grads = (gradients * grad_loss).unbind()
    return None, None, None, *grads, *(None,) * (len(inputs) - len(grads))


def differentiated_once(op: str) -> Callable[[Backward], Backward]:
    """Let gradients that the decorated ``backward`` computes raise where they are differentiated.

    With ``create_graph=True``, torch would take what a kernel computed as constant, and return a
    second derivative that lacks terms. ``torch.autograd.function.once_differentiable`` refuses only
    where the upstream gradient requires grad, which that of ``loss.backward()`` does not.
    ``backward`` saves its op's differentiable inputs, or outputs.
    """

    def decorate(backward: Backward) -> Backward:
        @wraps(backward)
        def run(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
            if not torch.is_grad_enabled():
                return backward(ctx, *upstream)
            with torch.no_grad():
                gradients = backward(ctx, *upstream)
            inputs = (*upstream, *ctx.saved_tensors)
            found = _DifferentiatedTwice.apply(op, len(gradients), *gradients, *inputs)
            return tuple(found)

        return run

    return decorate


class _DifferentiatedTwice(torch.autograd.Function):
    """Return gradients, tied to the inputs that they depend on; its own backward raises."""

    @staticmethod
    def forward(
        ctx: Any, op: str, count: int, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.op = op
        return tuple(None if x is None else x.clone() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[None, ...]:
        raise RuntimeError(
            f"{ctx.op}: its kernels compute no second derivative (create_graph=True); use "
            f"{ctx.op}(..., impl='reference'), which plain PyTorch differentiates any number of "
            "times"
        )
