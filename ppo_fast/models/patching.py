"""Temporarily replace modules' forward methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced_forwards(
    replacements: Sequence[tuple[nn.Module, Callable[..., Any]]],
) -> Iterator[None]:
    """Temporarily replace the forward of each module by the function beside it.

    Hooks stay in force. After the block, also if it raised, each module has its own forward again,
    including one set on the instance, as accelerate does.
    """
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
