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


def _linear_logprobs_forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    mask: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    with_entropy: bool,
    budget_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, dtype = hidden.shape[0], _computed_in(
        torch.promote_types(hidden.dtype, weight.dtype)
    )
    kept = torch.sym_min(num_rows * weight.shape[0], budget_bytes // dtype.itemsize)
    shapes = ((num_rows,), (num_rows if with_entropy else 0,), (num_rows, 2), (kept,))
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)  # type: ignore[return-value]


linear_logprobs_forward_cpp = _define(
    "linear_logprobs_forward_cpp(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
    "Tensor? mask, float temperature, float logit_scale, float? softcap, bool with_entropy, "
    "int budget_bytes) -> (Tensor logprobs, Tensor entropy, Tensor stats, Tensor kept)",
    "linear_logprobs/linear_logprobs_forward",
    _linear_logprobs_forward_fake,
)


def _linear_logprobs_backward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs: list[bool] = rest[-1]
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        (weight if bias is None else bias).new_empty(weight.shape[:1] if needs[2] else (0,)),
    )


linear_logprobs_backward_cpp = _define(
    "linear_logprobs_backward_cpp(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
    "Tensor? mask, float temperature, float logit_scale, float? softcap, Tensor entropy, "
    "Tensor stats, Tensor kept, Tensor? grad_logprobs, Tensor? grad_entropy, bool drop_zero_rows, "
    "bool[3] needs_grad) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    "linear_logprobs/linear_logprobs_backward",
    _linear_logprobs_backward_fake,
)
