"""Weights that rest in host memory, and are on their device while they are used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ppo_fast.models.quantized import packed_weights

MOVED = {"cuda"}
"""Types of devices whose memory is not the host's."""


class Resting:
    """Frozen tensors that rest in host memory.

    Their objects stay the same, so that who holds a weight still holds it; its data are those of
    the host's copy, or of one on the device. The copy stays in the host's memory, pinned, so that
    nothing is copied back. Tensors on the CPU stay as they are.

    Args:
        tensors: weights and buffers that nothing changes from now on.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        moved = [tensor for tensor in dict.fromkeys(tensors) if tensor.device.type in MOVED]
        self._places = [(tensor, tensor.device, to_host(tensor.detach())) for tensor in moved]
        self._users = 0
        wait_for(tensor.device for tensor in moved)
        self._rest()

    @property
    def nbytes(self) -> int:
        """Size in bytes of what rests."""
        return sum(host.nbytes for _, _, host in self._places)

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Within the block, the tensors are on their devices; blocks may be nested."""
        self._users += 1
        try:
            if self._users == 1:
                for tensor, device, host in self._places:
                    tensor.data = to_device(host, device)
            yield
        finally:
            self._users -= 1
            if self._users == 0:
                self._rest()

    def _rest(self) -> None:
        for tensor, _, host in self._places:
            tensor.data = host


def own_tensors(model: nn.Module, *others: nn.Module) -> list[Tensor]:
    """Return the weights and buffers of ``model`` that none of ``others`` has.

    Quantised weights, whose constants lie elsewhere, are left out: they stay on their device.
    """
    shared = {id(tensor) for other in others for tensor in _tensors(other)}
    shared |= {id(weight) for weight in packed_weights(model)}
    return [tensor for tensor in _tensors(model) if id(tensor) not in shared]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def to_host(tensor: Tensor, into: Tensor | None = None) -> Tensor:
    """Copy a tensor to pinned host memory, without waiting; see ``wait_for``.

    ``into``: a tensor in host memory that is overwritten, if it has the same shape and dtype.
    """
    if into is None or into.shape != tensor.shape or into.dtype != tensor.dtype:
        # a GPU reads and writes pinned memory by itself, and faster
        pinned = tensor.device.type == "cuda"
        into = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
    return into.copy_(tensor, non_blocking=True)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, without waiting: what the device does next sees the copy."""
    return host.to(device, non_blocking=True, copy=True)


def wait_for(devices: Iterable[torch.device]) -> None:
    """Wait until copies from these devices are in host memory, where the CPU may read them."""
    for device in set(devices):
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
