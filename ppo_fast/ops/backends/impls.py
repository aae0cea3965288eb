"""Which implementations exist, and which can run in this installation."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Literal

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
    "quantize_rows": ("cpp",),
    "decode_attention": ("triton",),
}

FASTEST: dict[str, Impl] = {"cpu": "cpp", "cuda": "triton"}

# Folders of ppo_fast.ops whose name is not that of their op.
FOLDERS = {"logprobs_from_logits": "logprobs"}


@cache
def missing(impl: Impl) -> str | None:
    """Return why ``impl`` cannot run in this installation; None when it can."""
    if impl == "cpp":
        try:
            importlib.import_module("ppo_fast.ops._C")
        except ImportError as error:
            return (
                f"the compiled extension ppo_fast.ops._C is not there ({error}); install ppo_fast "
                "anew with a C++17 compiler at hand (`ppo-fast env` says what was missing)"
            )
    if impl == "triton":
        try:
            importlib.import_module("triton")
        except ImportError as error:
            return f"triton cannot be imported ({error})"
    return None
