"""Undo: the weights and moments of before an update, to put them back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Undo:
    """A copy, in host memory, of what an update changes.

    Args:
        optimizers: by name; their weights and states are copied.
    """

    def __init__(self, optimizers: dict[str, Optimizer]) -> None:
        self._optimizers = optimizers
        self._weights: dict[Tensor, Tensor] = {}
        self._states: dict[Tensor, dict[str, Any]] = {}

    @torch.no_grad()
    def keep(self) -> None:
        """Copy weights and states as they are now, in place of those kept before."""
        states: dict[Tensor, dict[str, Any]] = {}
        for optimizer in self._optimizers.values():
            for weight in _of(optimizer):
                self._weights[weight] = _copied(weight.detach(), self._weights.get(weight))
                before = self._states.get(weight, {})
                states[weight] = {
                    name: _copied(value, before.get(name)) if isinstance(value, Tensor) else value
                    for name, value in optimizer.state.get(weight, {}).items()
                }
        self._states = states

    @torch.no_grad()
    def put_back(self) -> None:
        """Make weights and states what they were when ``keep`` was called last."""
        for optimizer in self._optimizers.values():
            for weight in _of(optimizer):
                weight.copy_(self._weights[weight])
                now, before = optimizer.state.get(weight, {}), self._states[weight]
                for name in set(now) - set(before):
                    del now[name]
                for name, value in before.items():
                    if isinstance(value, Tensor):
                        now[name].copy_(value)
                    else:
                        now[name] = value
                if not now:
                    optimizer.state.pop(weight, None)


def _of(optimizer: Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _copied(tensor: Tensor, before: Tensor | None) -> Tensor:
    """Return a copy on the CPU, in the memory of the one before, if there is one."""
    if before is None or before.shape != tensor.shape or before.dtype != tensor.dtype:
        return tensor.to("cpu", copy=True)
    return before.copy_(tensor)
