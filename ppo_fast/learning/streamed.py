"""States of optimizers that rest in host memory, and come to the device in pieces for a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ppo_fast.models.offload import MOVED, to_device, to_host, wait_for

PIECE_BYTES = 2**28
"""Max bytes of moments, with two float32 numbers a weight, that are on the device at one time."""


class StreamedStates:
    """Makes optimizer steps whose states are in host memory before and after.

    A step is made in pieces, each of some weights: their states are copied to the device, updated
    and copied back. The results are those of one step. (Hooks of the optimizer run for each piece.)
    Weights on the CPU are updated at once, as ever.

    Args:
        on: whether states are streamed; False: ``step`` is the optimizer's own.
        piece_bytes: max bytes of states on the device; a larger weight makes a piece of its own.
    """

    def __init__(self, *, on: bool, piece_bytes: int = PIECE_BYTES) -> None:
        self.on, self.piece_bytes = on, piece_bytes
        self._host: dict[tuple[Tensor, str], Tensor] = {}

    def adopt(self, optimizer: Optimizer) -> None:
        """Let the states that an optimizer loads stay in host memory until its next step."""
        if not self.on:
            return
        loaded: list[dict[int, dict[str, Any]]] = []

        def without_states(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            loaded[:] = [state_dict["state"]]
            return state_dict | {"state": {}}

        def put(optimizer: Optimizer) -> None:
            groups = optimizer.param_groups
            weights = [(weight, group) for group in groups for weight in group["params"]]
            for index, state in loaded.pop().items():
                weight, group = weights[index]
                on_device = group.get("fused") or group.get("capturable")
                optimizer.state[weight] = {
                    name: _loaded(value, weight, on_device=bool(on_device))
                    for name, value in state.items()
                }

        optimizer.register_load_state_dict_pre_hook(without_states)
        optimizer.register_load_state_dict_post_hook(put)

    def step(self, optimizer: Optimizer) -> None:
        """Make a step of an optimizer."""
        given = [w for group in optimizer.param_groups for w in group["params"]]
        weights = [weight for weight in given if weight.grad is not None]
        if not self.on or not any(weight.device.type in MOVED for weight in weights):
            optimizer.step()
            return
        gradients = [weight.grad for weight in weights]
        try:
            for piece in self._pieces(weights):
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight.grad = gradient if weight in piece else None  # it steps those alone
                self._fetch(optimizer, piece)
                try:
                    optimizer.step()
                finally:
                    self._put_away(optimizer, piece)
        finally:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            wait_for(weight.device for weight in weights)

    def _pieces(self, weights: list[Tensor]) -> Iterator[set[Tensor]]:
        piece: set[Tensor] = set()
        size = 0
        for weight in weights:
            if piece and size + 8 * weight.numel() > self.piece_bytes:
                yield piece
                piece, size = set(), 0
            piece.add(weight)
            size += 8 * weight.numel()
        yield piece

    def _fetch(self, optimizer: Optimizer, piece: set[Tensor]) -> None:
        for weight in piece:
            state = optimizer.state.get(weight, {})
            for name, value in _moved(state, weight):
                state[name] = to_device(value, weight.device)

    def _put_away(self, optimizer: Optimizer, piece: set[Tensor]) -> None:
        for weight in piece:
            state = optimizer.state.get(weight, {})
            for name, value in _moved(state, weight):
                place = weight, name
                self._host[place] = state[name] = to_host(value, self._host.get(place))


def _moved(state: dict[str, Any], weight: Tensor) -> list[tuple[str, Tensor]]:
    """Return the tensors of a weight's state that have its size; counters stay where they are."""
    tensors = [(name, value) for name, value in state.items() if isinstance(value, Tensor)]
    return [(n, value) for n, value in tensors if n != "step" and value.shape == weight.shape]


def _loaded(value: Any, weight: Tensor, *, on_device: bool) -> Any:
    """Return a copy of an entry of a saved state, for a weight: where the optimizer expects it."""
    if not isinstance(value, Tensor):
        return value
    if value.shape == weight.shape:
        return value.to("cpu", copy=True)
    device = weight.device if on_device else torch.device("cpu")
    return value.to(device, torch.float32, copy=True)
