"""Recording and replay of tensor operations on the CPU, in place of a CUDA graph."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# What a stream that is being captured refuses: to wait for the device, and to read the host's
# memory, which may have changed when the graph is replayed.
REFUSED = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_dim.default,
    aten.lift_fresh.default,
}
ALLOCATING = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty}


class RecordedOps(TorchDispatchMode):
    """Within the block, record the tensor operations, with their addresses, sizes and numbers.

    ``replay`` repeats them into the same memory, without running Python code again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        index = tree_leaves(args[1]) if func is aten.index.Tensor else []
        if func in REFUSED or any(x is not None and x.dtype == torch.bool for x in index):
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @property
    def launches(self) -> int:
        """Least number of kernels that a GPU would launch: one per call that computes something."""
        return sum(1 for func, *_ in self.calls if computes(func))

    def replay(self) -> None:
        for func, args, kwargs, recorded in self.calls:
            again = func(*args, **kwargs)
            pairs = zip(tree_leaves(recorded), tree_leaves(again), strict=True)
            for (old, new), returned in zip(pairs, func._schema.returns, strict=False):
                if isinstance(old, Tensor) and returned.alias_info is None:
                    old.copy_(new)


def recorded_ops(device: torch.device) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Return the function that captures a step, as ``cuda_graphs`` does for a GPU."""

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        with RecordedOps() as ops:
            step()
        return ops.replay

    return capture


def computes(func: Any) -> bool:
    """Return whether a GPU would launch a kernel for this operation."""
    if func.overloadpacket in ALLOCATING or func is aten._unsafe_view.default:
        return False
    is_view = any(r.alias_info is not None for r in func._schema.returns)
    return not is_view or func._schema.is_mutable


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within the block, run a rollout's steps as tensor operations only.

    Layers in C++, which a recording would miss, and checks that read values are switched off.
    """
    modules = {
        name: importlib.import_module(f"ppo_fast.{name}")
        for name in (
            "rollout.decode",
            "rollout.by_slots",
            "ops.validation",
            "ops.sample_tokens.api",
            "ops.decode_attention.api",
        )
    }
    with (
        patch.object(modules["rollout.decode"], "own_cache", lambda _: None),
        patch.object(modules["rollout.by_slots"], "layers_can_be_fused", lambda _: False),
        patch.object(modules["rollout.by_slots"], "few_row_products", nullcontext),
        patch.object(modules["ops.validation"], "values_readable", lambda _: False),
        patch.object(modules["ops.sample_tokens.api"], "values_readable", lambda _: False),
        patch.object(modules["ops.decode_attention.api"], "values_readable", lambda _: False),
    ):
        yield
