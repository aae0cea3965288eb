"""The error of numbers that are NaN or infinite, and the search for where they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class NotFiniteError(FloatingPointError, ValueError):
    """A reward, value, loss, gradient or logit is NaN or infinite; no weight was changed by it."""


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity; None: all are finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the trained weights of a module, by name."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a module's weights, by the weights' names."""
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
