"""Linear layers on the CPU that compute a few rows as fast as memory can be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppo_fast.models.patching import replaced_forwards
from ppo_fast.ops.backends.dispatch import choose
from ppo_fast.ops.few_row_linear.api import MOST_ROWS
from ppo_fast.ops.few_row_linear.cpp import few_row_linear


def why_no_few_row_products(model: nn.Module) -> str | None:
    """Return the reason why ``few_row_linear`` and fused layers cannot be used, or None."""
    device = next(model.parameters()).device
    if device.type != "cpu":
        return f"the model is on {device}"
    if torch.is_autocast_enabled("cpu"):
        return "under autocast"
    choice = choose("few_row_linear", "auto", device)
    return None if choice.impl == "cpp" else f"{choice.impl} operations: {choice.reason}"


@contextmanager
def few_row_products(model: nn.Module) -> Iterator[None]:
    """Within the block, compute few rows in ``nn.Linear`` layers on the CPU by ``few_row_linear``.

    Hooks stay in force. Layers of other classes, layers whose forward was replaced, and all layers
    under autocast or without the compiled extension keep their own forward.
    """
    if why_no_few_row_products(model) is not None:
        yield
        return
    layers = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
    with replaced_forwards([(layer, partial(_forward, layer)) for layer in layers]):
        yield


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    if 0 < x.numel() <= MOST_ROWS * layer.in_features and x.dtype == layer.weight.dtype:
        return few_row_linear(x, layer.weight, layer.bias)
    return F.linear(x, layer.weight, layer.bias)
