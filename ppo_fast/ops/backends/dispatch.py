"""Which implementation an op runs on, and why.

``impl="auto"`` picks by device: the Triton kernel for CUDA tensors, the C++ kernel for CPU tensors,
and the reference where an op has no kernel for the device, Triton none for float64, or where its
Triton kernels failed the check of their first use (first_use.py). An explicit ``impl=`` (the
environment variable ``PPO_FAST_IMPL`` counts as one) never falls back: it raises, saying what is
missing.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Literal, NamedTuple

import torch

from ppo_fast.ops.backends import first_use

Impl = Literal["auto", "reference", "cpp", "triton"]

# Every op has a reference; these are the compiled implementations that exist beside it.
COMPILED: dict[str, tuple[Impl, ...]] = {
    "logprobs_from_logits": ("cpp", "triton"),
    "linear_logprobs": ("cpp", "triton"),
    "gae": ("cpp", "triton"),
    "kl_estimate": ("cpp", "triton"),
    "ppo_loss": ("cpp", "triton"),
    "value_loss": ("cpp", "triton"),
    "whiten": ("cpp", "triton"),
    "sample_tokens": ("cpp", "triton"),
    "few_row_linear": ("cpp",),
    "decode_attention": ("triton",),
}

FASTEST: dict[str, Impl] = {"cpu": "cpp", "cuda": "triton"}


class Choice(NamedTuple):
    """An implementation and the reason that it was chosen."""

    impl: Impl
    reason: str


@cache
def missing(impl: Impl) -> str | None:
    """Why ``impl`` cannot run in this installation; None when it can."""
    if impl == "cpp":
        try:
            importlib.import_module("ppo_fast._C")
        except ImportError as error:
            return f"the compiled extension ppo_fast._C is not there ({error}); `pip install .`"
    if impl == "triton":
        try:
            importlib.import_module("triton")
        except ImportError as error:
            return f"triton cannot be imported ({error})"
    return None


@torch.compiler.assume_constant_result  # torch.compile takes the answer and traces nothing of it
def choose(op: str, impl: Impl, device: torch.device, dtype: torch.dtype = torch.float32) -> Choice:
    """The implementation that ``op`` uses for tensors of ``dtype`` on ``device``.

    Raises ValueError for an unknown ``impl``, NotImplementedError for one that ``op`` does not
    have (Triton: for float64), RuntimeError for one that cannot run here.
    """
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
