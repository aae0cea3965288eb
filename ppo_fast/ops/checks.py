"""The argument checks that the per-token ops share: every message names what it got."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def check_tokens(
    op: str, required: Mapping[str, object], optional: Mapping[str, object] | None = None
) -> None:
    """Hold float tensors and a bool "mask", by name, to one shape [B, T] and one device.

    An entry of ``optional`` may be None: an argument that was not given. Raises TypeError for what
    is no tensor or has the wrong dtype, ValueError for shapes and devices (listing all of them).
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
    first = next(iter(given.values()))
    if first.ndim != 2 or any(x.shape != first.shape for x in given.values()):
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in given.items())
        raise ValueError(f"{op}: expected one shape [B, T] for all, got {shapes}")
    if any(x.device != first.device for x in given.values()):
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
    limits = {"at least": at_least, "above": above, "below": below}
    stated = [f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit)]
    expected = " ".join(["a finite number", " and ".join(stated)]).rstrip()
    if not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} is {type(value).__name__}, expected {expected}")
    if not (value >= at_least and above < value < below):  # false for nan and inf too
        raise ValueError(f"{op}: {name} is {value}, expected {expected}")


def check_choice(op: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError, listing what is allowed, unless ``value`` is among it."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} is {value!r}, expected one of {', '.join(allowed)}")


def check_normalizer(op: str, normalizer: float | Tensor | None) -> None:
    """A positive number or a 0-dim tensor; a tensor's value is not read (that would be a sync)."""
    if isinstance(normalizer, Tensor):
        if normalizer.ndim != 0:
            shape = list(normalizer.shape)
            raise ValueError(f"{op}: normalizer has shape {shape}, expected a 0-dim tensor")
    elif normalizer is not None:
        check_number(op, "normalizer", normalizer, above=0)
