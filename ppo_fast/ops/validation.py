"""Argument checks that several ops share.

Shapes, dtypes and devices are checked everywhere. Values are read only where that costs nothing: on
CPU tensors outside of a compiler. On a GPU it would wait for the device, and a traced graph cannot
branch on them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def values_readable(tensor: Tensor) -> bool:
    """Whether looking at the numbers in ``tensor`` costs no synchronisation and breaks no trace."""
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and type(tensor) is torch.Tensor  # not a FakeTensor or another wrapper
    )


def check_floating(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless ``tensor`` holds floating-point numbers."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: got {tensor.dtype}, expected a floating-point tensor")


def check_same_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises ValueError unless ``tensor`` is on ``device``."""
    if tensor.device != device:
        raise ValueError(
            f"{name}: is on {tensor.device}, expected {device}; move it with .to({str(device)!r})"
        )


def check_int64(name: str, tensor: Tensor, shape: torch.Size, device: torch.device) -> None:
    """Raises unless ``tensor`` is an int64 tensor of ``shape`` on ``device``."""
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name}: got {tensor.dtype}, expected torch.int64; convert with .long()")
    if tensor.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    check_same_device(name, tensor, device)


def check_mask(mask: Tensor | None, shape: torch.Size, device: torch.device) -> None:
    """Raises unless ``mask`` is None or a bool tensor of ``shape`` on ``device``."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: got {mask.dtype}, expected torch.bool; convert with .bool()")
    if mask.shape != shape:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected {tuple(shape)}")
    check_same_device("mask", mask, device)


def check_labels_in_range(labels: Tensor, vocab_size: int, mask: Tensor | None) -> None:
    """Raises ValueError if an unmasked label is not a token id, where values are readable."""
    if not values_readable(labels):
        return
    wrong = (labels < 0) | (labels >= vocab_size)
    if mask is not None:
        wrong &= mask
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"labels: got {int(labels[where])} at {where}, expected 0 to {vocab_size - 1}; "
            "positions without a token must be False in mask"
        )


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless 0 < temperature < inf."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}, expected a finite number above 0")
