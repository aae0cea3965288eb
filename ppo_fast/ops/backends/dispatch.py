"""Choose the implementation that an op runs on, and say why.

``impl="auto"`` picks by device: the Triton kernel for CUDA tensors, the C++ kernel for CPU tensors.
It picks the reference where the op has no kernel for the device or this installation cannot run it,
for float64 on CUDA, and where the op's Triton kernels failed the first-use check (first_use.py). An
explicit ``impl=`` (the environment variable ``PPO_FAST_IMPL`` counts as one) never falls back: it
raises, saying what is missing.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from ppo_fast.ops.backends import first_use
from ppo_fast.ops.backends.impls import COMPILED, FASTEST, Impl, missing


class Choice(NamedTuple):
    """An implementation and the reason that it was chosen."""

    impl: Impl
    reason: str


def choose(op: str, impl: Impl, device: torch.device, dtype: torch.dtype = torch.float32) -> Choice:
    """Return the implementation that ``op`` uses for tensors of ``dtype`` on ``device``.

    Raises ValueError for an unknown ``impl``, NotImplementedError for one that ``op`` does not
    have (or for Triton with float64), RuntimeError for one that cannot run here, or where the op is
    called under a transform of torch.func or forward-mode autograd, which only the reference knows.
    """
    choice = _choose(op, impl, device, dtype)
    if choice.impl != "reference" and (transform := _active_transform()):
        raise RuntimeError(
            f"{op}: its kernels cannot run under {transform}; use impl='reference', plain PyTorch"
        )
    return choice


# Makes torch.compile call this function and use its result without tracing it. The attribute is
# what torch.compiler.assume_constant_result sets; calling that would import torch._dynamo: slow.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _active_transform() -> str | None:
    """Return the name of an active transform that kernels' addresses cannot see through, if any."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func (grad, vmap, jvp ...)"
    return "forward-mode autograd" if forward_ad._current_level >= 0 else None


def _choose(op: str, impl: Impl, device: torch.device, dtype: torch.dtype) -> Choice:
    named = os.environ.get("PPO_FAST_IMPL")
    if impl == "auto" and not named:
        return _choose_by_device(op, device, dtype)
    source = f'impl="{impl}"'
    if impl == "auto":
        source, impl = f"PPO_FAST_IMPL={named}", named  # type: ignore[assignment]
        if impl == "auto":
            return _choose_by_device(op, device, dtype)
    if impl not in ("reference", "cpp", "triton"):
        raise ValueError(f"{source}: expected auto, reference, cpp or triton")
    if impl == "reference":
        return Choice("reference", source)
    if impl not in COMPILED[op]:
        have = ", ".join(("reference", *COMPILED[op]))
        raise NotImplementedError(f"{source}: {op} has no such implementation; it has {have}")
    if reason := missing(impl):
        raise RuntimeError(f"{source}: {reason}; or use impl='reference'")
    if impl == "triton" and dtype == torch.float64:
        raise NotImplementedError(f"{source}: {op} got float64; use float32 or impl='reference'")
    wanted = "cpu" if impl == "cpp" or _triton_interpreted() else "cuda"
    if device.type != wanted:
        raise RuntimeError(f"{source}: {op} got tensors on {device}, expected {wanted}")
    return Choice(impl, source)


def _triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _choose_by_device(op: str, device: torch.device, dtype: torch.dtype) -> Choice:
    compiled = FASTEST.get(device.type)
    if compiled is None:
        return Choice("reference", f"no kernels for {device.type}")
    if compiled not in COMPILED[op]:
        return Choice("reference", f"no {compiled} kernel yet")
    if compiled == "triton" and dtype == torch.float64:
        return Choice("reference", "the triton kernels have no float64")
    if reason := missing(compiled):
        return Choice("reference", reason)
    if compiled == "triton" and not (result := first_use.first_use(op, device)).ok:
        return Choice("reference", f"its triton kernels failed their check: {result.detail}")
    return Choice(compiled, f"fastest on {device.type}")
