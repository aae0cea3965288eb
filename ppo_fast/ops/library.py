"""Every torch.library schema and fake kernel, in one place.

The schemas carry no autograd: an op that has a gradient wraps them in a torch.autograd.Function in
its api.py. ``define`` + ``impl`` is used since ``torch.library.custom_op`` costs three times as
much a call. Launchers, and with them the compiled extension, are imported at an op's first call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops.stats import PPO_STATS, VALUE_STATS

_library = torch.library.Library("ppo_fast", "DEF")


def _define(schema: str, launcher: str, fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """An op on CPU tensors, launched by ``launcher`` ("op/function" of that op's cpp.py); ``fake``
    makes outputs without values."""
    name = schema.partition("(")[0]
    folder, _, function = launcher.partition("/")

    @cache
    def load() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"ppo_fast.ops.{folder}.cpp"), function)

    _library.define(schema)
    _library.impl(name, lambda *args: load()(*args), "CPU")
    torch.library.register_fake(f"ppo_fast::{name}", fake, lib=_library)
    return getattr(torch.ops.ppo_fast, name).default


def number(x: float) -> Tensor:
    """``x`` as a 0-dim tensor: how an op takes a number that may change from step to step, since
    torch.compile would compile a float in, and again at the next step."""
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=torch.float64) * x  # one of the few forms that it traces
    return torch.scalar_tensor(x, dtype=torch.float64)


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
    num_rows, dtype = hidden.shape[0], _computed_in(torch.promote_types(hidden.dtype, weight.dtype))
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


def _sample_tokens_fake(logits: Tensor, seeds: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = logits.new_empty(logits.shape[:1], dtype=_computed_in(logits.dtype))
    return torch.empty_like(seeds), logprobs, torch.empty_like(logprobs)


sample_tokens_cpp = _define(
    "sample_tokens_cpp(Tensor logits, Tensor seeds, Tensor positions, float temperature, "
    "int top_k, float top_p) -> (Tensor tokens, Tensor logprobs, Tensor sampling_logprobs)",
    "sample_tokens/sample_tokens",
    _sample_tokens_fake,
)


def _kl_estimate_fake(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimator: str, with_slope: bool
) -> tuple[Tensor, Tensor]:
    slope_shape = logprobs.shape if with_slope else (0,)
    return logprobs.new_empty(logprobs.shape), logprobs.new_empty(slope_shape)


kl_estimate_cpp = _define(
    "kl_estimate_cpp(Tensor logprobs, Tensor ref_logprobs, Tensor? mask, str estimator, "
    "bool with_slope) -> (Tensor estimate, Tensor slope)",
    "kl_estimate/kl_estimate",
    _kl_estimate_fake,
)


def _ppo_loss_fake(logprobs: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_gradients = rest[-1]
    return (
        logprobs.new_empty(()),
        logprobs.new_empty(len(PPO_STATS), dtype=torch.float32),
        logprobs.new_empty((num_gradients, *logprobs.shape)),
    )


ppo_loss_cpp = _define(
    "ppo_loss_cpp(Tensor logprobs, Tensor? entropy, Tensor old_logprobs, Tensor advantages, "
    "Tensor? ref_logprobs, Tensor mask, float clip_low, float clip_high, float? dual_clip, "
    "Tensor? kl_coef, str kl_estimator, Tensor? entropy_coef, str aggregation, "
    "Tensor? normalizer, "
    "int num_gradients) -> (Tensor loss, Tensor metrics, Tensor gradients)",
    "ppo_loss/ppo_loss",
    _ppo_loss_fake,
)


def _value_loss_fake(values: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    with_gradient = rest[-1]
    return (
        values.new_empty(()),
        values.new_empty(len(VALUE_STATS), dtype=torch.float32),
        values.new_empty(values.shape if with_gradient else (0,)),
    )


value_loss_cpp = _define(
    "value_loss_cpp(Tensor values, Tensor? old_values, Tensor returns, Tensor mask, float? clip, "
    "Tensor? normalizer, bool with_gradient) -> (Tensor loss, Tensor metrics, Tensor gradient)",
    "value_loss/value_loss",
    _value_loss_fake,
)

whiten_cpp = _define(
    "whiten_cpp(Tensor values, Tensor mask) -> (Tensor whitened, Tensor scale)",
    "whiten/whiten",
    lambda values, _: (
        values.new_empty(values.shape),
        values.new_empty((), dtype=torch.float64),
    ),
)

whiten_backward_cpp = _define(
    "whiten_backward_cpp(Tensor grad_whitened, Tensor whitened, Tensor mask, Tensor scale) "
    "-> Tensor",
    "whiten/whiten_backward",
    lambda grad_whitened, whitened, *_: whitened.new_empty(whitened.shape),
)
