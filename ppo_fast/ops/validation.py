"""Argument checks that several ops share.

Shapes, dtypes and devices are checked everywhere. Values are read only where that costs nothing: on
CPU tensors outside of a compiler. On a GPU a read would wait for the device, and a traced graph
cannot branch on values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def values_readable(tensor: Tensor) -> bool:
    """Return whether reading ``tensor``'s values costs no synchronisation and breaks no trace."""
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and type(tensor) is torch.Tensor  # not a FakeTensor or another wrapper
    )


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless ``tensor`` holds floating-point numbers."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: got {tensor.dtype}, expected a floating-point tensor")


def check_same_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless ``tensor`` is on ``device``."""
    if tensor.device != device:
        raise ValueError(
            f"{name}: is on {tensor.device}, expected {device}; move it with .to({str(device)!r})"
        )


def check_int64(name: str, tensor: Tensor, shape: torch.Size, device: torch.device) -> None:
    """Raise unless ``tensor`` is an int64 tensor of ``shape`` on ``device``."""
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name}: got {tensor.dtype}, expected torch.int64; convert with .long()")
    if tensor.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    check_same_device(name, tensor, device)


def check_mask(mask: Tensor | None, shape: torch.Size, device: torch.device) -> None:
    """Raise unless ``mask`` is None or a bool tensor of ``shape`` on ``device``."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: got {mask.dtype}, expected torch.bool; convert with .bool()")
    if mask.shape != shape:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected {tuple(shape)}")
    check_same_device("mask", mask, device)


def check_labels_in_range(labels: Tensor, vocab_size: int, mask: Tensor | None) -> None:
    """Raise ValueError if an unmasked label is not a token id, where values are readable."""
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
    """Raise ValueError unless 0 < temperature < inf."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}, expected a finite number above 0")


def check_tokens(
    op: str,
    required: Mapping[str, object],
    optional: Mapping[str, object] | None = None,
    *,
    packed: bool = False,
) -> None:
    """Check that float tensors and a bool "mask", by name, share one shape [B, T] and one device.

    With ``packed``, the shape may be [total] too. An entry of ``optional`` may be None: an argument
    that was not given. Raises TypeError for an
    entry that is no tensor or has the wrong dtype, ValueError for differing shapes or devices
    (listing all of them).
    """
    given: dict[str, Tensor] = {}
    for name, x in [*required.items(), *(optional or {}).items()]:
        if x is None and name not in required:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} is {type(x).__name__}, expected a tensor [B, T]")
        if name == "mask" and x.dtype is not torch.bool:
            raise TypeError(f"{op}: mask is {x.dtype}, expected torch.bool; use mask.bool()")
        if name != "mask" and not x.is_floating_point():
            raise TypeError(
                f"{op}: {name} is {x.dtype}, expected a float dtype; use {name}.float()"
            )
        given[name] = x
    first, *others = given.values()
    shape, device = first.shape, first.device
    fits = len(shape) == 2 or (packed and len(shape) == 1)
    if not fits or any(x.shape != shape for x in others):
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in given.items())
        expected = "[B, T], or [total]," if packed else "[B, T]"
        raise ValueError(f"{op}: expected one shape {expected} for all, got {shapes}")
    if any(x.device != device for x in others):
        devices = ", ".join(f"{name} on {x.device}" for name, x in given.items())
        raise ValueError(f"{op}: expected one device for all, got {devices}")


def check_number(
    op: str,
    name: str,
    value: float,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Raise TypeError unless ``value`` is a number, ValueError unless it is finite and in range."""
    # False for NaN and inf too. The message is built only where it is needed.
    if isinstance(value, (int, float)) and value >= at_least and above < value < below:
        return
    limits = {"at least": at_least, "above": above, "below": below}
    stated = [f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit)]
    expected = " ".join(["a finite number", " and ".join(stated)]).rstrip()
    if not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} is {type(value).__name__}, expected {expected}")
    raise ValueError(f"{op}: {name} is {value}, expected {expected}")


def check_choice(op: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError, listing the allowed names, unless ``value`` is one of them."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} is {value!r}, expected one of {', '.join(allowed)}")


def check_normalizer(op: str, normalizer: float | Tensor | None) -> None:
    """Check that ``normalizer`` is None, a number above 0 or a 0-dim tensor (not read: a sync)."""
    if isinstance(normalizer, Tensor):
        if normalizer.ndim != 0:
            shape = list(normalizer.shape)
            raise ValueError(f"{op}: normalizer has shape {shape}, expected a 0-dim tensor")
    elif normalizer is not None:
        check_number(op, "normalizer", normalizer, above=0)
