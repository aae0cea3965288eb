"""Every torch.library schema and fake kernel, in one place.

The schemas carry no autograd: an op that has a gradient wraps them in a torch.autograd.Function in
its api.py. ``define`` + ``impl`` is used since ``torch.library.custom_op`` costs three times as
much a call. Launchers, and with them the compiled extension, are imported at an op's first call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("ppo_fast", "DEF")


def _define(schema: str, launcher: str, fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """An op on CPU tensors, launched by ``launcher`` ("op/function" of that op's cpp.py); ``fake``
    makes outputs without values."""
    name = schema.partition("(")[0]
    folder, _, function = launcher.partition("/")

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"ppo_fast.ops.{folder}.cpp"), function)(*args)

    _library.define(schema)
    _library.impl(name, launch, "CPU")
    torch.library.register_fake(f"ppo_fast::{name}", fake, lib=_library)
    return getattr(torch.ops.ppo_fast, name).default


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


gae_cpp = _define(
    "gae_cpp(Tensor rewards, Tensor values, Tensor? mask, Tensor? dones, "
    "Tensor bootstrap_value, Tensor lam, float gamma) -> (Tensor advantages, Tensor returns)",
    "gae/gae",
    lambda rewards, *_: (rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)),
)


def _logprobs_forward_fake(
    logits: Tensor, labels: Tensor, mask: Tensor | None, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lead, dtype = logits.shape[:-1], _computed_in(logits.dtype)
    entropy_shape = lead if with_entropy else (0,)
    shapes = (lead, entropy_shape, (*lead, 2))
    return tuple(logits.new_empty(shape, dtype=dtype) for shape in shapes)  # type: ignore[return-value]


logprobs_forward_cpp = _define(
    "logprobs_forward_cpp(Tensor logits, Tensor labels, Tensor? mask, float temperature, "
    "bool with_entropy) -> (Tensor logprobs, Tensor entropy, Tensor stats)",
    "logprobs/logprobs_forward",
    _logprobs_forward_fake,
)

logprobs_backward_cpp = _define(
    "logprobs_backward_cpp(Tensor logits, Tensor labels, Tensor? mask, float temperature, "
    "Tensor entropy, Tensor stats, Tensor? grad_logprobs, Tensor? grad_entropy) -> Tensor",
    "logprobs/logprobs_backward",
    lambda logits, *_: logits.new_empty(logits.shape),
)
