"""Temporarily replace modules' forward methods."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
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


def uncompiled(module: nn.Module, around: nn.Module | None = None) -> AbstractContextManager[Any]:
    """Within the block, run what torch.compile compiled in ``module`` as plain PyTorch.

    Compiled code does not see hooks and forwards that are set after its compilation.

    Args:
        module: a model.
        around: look at modules that contain this one, and at no others; None: at all modules.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    parts = module.modules() if around is None else _containing(module, around)
    if not any(map(is_compiled, parts)):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def is_compiled(module: nn.Module) -> bool:
    """Return whether torch.compile has compiled the module, or its forward."""
    return (
        module._compiled_call_impl is not None
        or hasattr(module, "_orig_mod")  # what torch.compile(module) returns
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    )


def _containing(module: nn.Module, part: nn.Module) -> Iterator[nn.Module]:
    path = next((name for name, other in module.named_modules() if other is part), "")
    yield module
    names = path.split(".")
    for depth in range(1, len(names)):
        yield module.get_submodule(".".join(names[:depth]))
