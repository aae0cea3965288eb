"""Other forwards for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced_forwards(
    replacements: Sequence[tuple[nn.Module, Callable[..., Any]]],
) -> Iterator[None]:
    """For the block, each module computes with the forward beside it. Hooks stay in force, and so
    does, afterwards and whatever was raised, a forward that a module had of its own (as accelerate
    gives it one)."""
    own = [vars(module).get("forward") for module, _ in replacements]
    try:
        for module, forward in replacements:
            module.forward = forward
        yield
    finally:
        for (module, _), kept in zip(replacements, own, strict=True):
            if kept is None:
                vars(module).pop("forward", None)  # the class's own again
            else:
                module.forward = kept
