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
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ppo_fast.ops.gradient import computed_in
from ppo_fast.ops.stats import PPO_STATS, VALUE_STATS

_library = torch.library.Library("ppo_fast", "DEF")

# The functions of an op by implementation; the reference needs none.
RawOp = dict[str, Callable[..., Any]]


def _define(
    schema: str,
    launcher: str,
    fake: Callable[..., Any],
    impls: tuple[str, ...] = ("cpp", "triton"),
) -> RawOp:
    """Define an op, ``ppo_fast::<name>_<impl>``, for each implementation.

    ``launcher`` is "folder/function": the function in <impl>.py of that op's folder. ``fake`` makes
    outputs without values.

    The functions returned take arguments by position, and a number where the schema has a 0-dim
    Tensor. It is a Tensor since torch.compile would compile a float in as a constant, and compile
    again when it changes.
    """
    return {impl: _define_impl(schema, launcher, fake, impl) for impl in impls}


def _define_impl(
    schema: str, launcher: str, fake: Callable[..., Any], impl: str
) -> Callable[..., Any]:
    stem, _, signature = schema.partition("(")
    name = f"{stem}_{impl}"
    folder, _, function = launcher.partition("/")

    @cache
    def load() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"ppo_fast.ops.{folder}.{impl}"), function)

    _library.define(f"{name}({signature}")
    # Triton's interpreter takes CPU tensors.
    for device in ("CPU",) if impl == "cpp" else ("CUDA", "CPU"):
        _library.impl(name, lambda *args: load()(*args), device)
    torch.library.register_fake(f"ppo_fast::{name}", fake, lib=_library)
    op = getattr(torch.ops.ppo_fast, name).default
    takes_tensor = ["Tensor" in str(argument.type) for argument in op._schema.arguments]

    def call(first: Tensor, *others: Any) -> Any:
        # No compiler or mode is active: skip the dispatcher and call the launcher.
        if (
            type(first) is Tensor
            and not torch.compiler.is_compiling()
            and not is_in_torch_dispatch_mode()
        ):
            return load()(first, *others)
        pairs = zip(others, takes_tensor[1:], strict=True)
        return op(first, *(_number(x) if t and isinstance(x, float) else x for x, t in pairs))

    return call


def _number(x: float) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=torch.float64) * x  # one of the few forms that it traces
    return torch.scalar_tensor(x, dtype=torch.float64)


gae = _define(
    "gae(Tensor rewards, Tensor values, Tensor? mask, Tensor? dones, "
    "Tensor bootstrap_value, Tensor lam, float gamma) -> (Tensor advantages, Tensor returns)",
    "gae/gae",
    lambda rewards, *_: (rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)),
)


def _logprobs_forward_fake(
    logits: Tensor, labels: Tensor, mask: Tensor | None, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lead, dtype = logits.shape[:-1], computed_in(logits.dtype)
    entropy_shape = lead if with_entropy else (0,)
    shapes = (lead, entropy_shape, (*lead, 2))
    return tuple(logits.new_empty(shape, dtype=dtype) for shape in shapes)  # type: ignore[return-value]


logprobs_forward = _define(
    "logprobs_forward(Tensor logits, Tensor labels, Tensor? mask, float temperature, "
    "bool with_entropy) -> (Tensor logprobs, Tensor entropy, Tensor stats)",
    "logprobs/logprobs_forward",
    _logprobs_forward_fake,
)

logprobs_backward = _define(
    "logprobs_backward(Tensor logits, Tensor labels, Tensor? mask, float temperature, "
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
    num_rows, dtype = hidden.shape[0], computed_in(torch.promote_types(hidden.dtype, weight.dtype))
    kept = torch.sym_min(num_rows * weight.shape[0], budget_bytes // dtype.itemsize)
    shapes = ((num_rows,), (num_rows if with_entropy else 0,), (num_rows, 2), (kept,))
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)  # type: ignore[return-value]


linear_logprobs_forward = _define(
    "linear_logprobs_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
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


linear_logprobs_backward = _define(
    "linear_logprobs_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
    "Tensor? mask, float temperature, float logit_scale, float? softcap, Tensor entropy, "
    "Tensor stats, Tensor kept, Tensor? grad_logprobs, Tensor? grad_entropy, bool drop_zero_rows, "
    "bool[3] needs_grad) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    "linear_logprobs/linear_logprobs_backward",
    _linear_logprobs_backward_fake,
)


def _sample_tokens_fake(logits: Tensor, seeds: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = logits.new_empty(logits.shape[:1], dtype=computed_in(logits.dtype))
    return torch.empty_like(seeds), logprobs, torch.empty_like(logprobs)


sample_tokens = _define(
    "sample_tokens(Tensor logits, Tensor seeds, Tensor positions, float temperature, "
    "int top_k, float top_p) -> (Tensor tokens, Tensor logprobs, Tensor sampling_logprobs)",
    "sample_tokens/sample_tokens",
    _sample_tokens_fake,
)


def _kl_estimate_fake(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimator: str, with_slope: bool
) -> tuple[Tensor, Tensor]:
    slope_shape = logprobs.shape if with_slope else (0,)
    return logprobs.new_empty(logprobs.shape), logprobs.new_empty(slope_shape)


kl_estimate = _define(
    "kl_estimate(Tensor logprobs, Tensor ref_logprobs, Tensor? mask, str estimator, "
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


ppo_loss = _define(
    "ppo_loss(Tensor logprobs, Tensor? entropy, Tensor old_logprobs, Tensor advantages, "
    "Tensor? ref_logprobs, Tensor? weights, Tensor mask, str ratio, str objective, "
    "float clip_low, float clip_high, float? dual_clip, Tensor kl_coef, str kl_estimator, "
    "Tensor entropy_coef, str aggregation, Tensor? normalizer, int num_gradients) "
    "-> (Tensor loss, Tensor metrics, Tensor gradients)",
    "ppo_loss/ppo_loss",
    _ppo_loss_fake,
)


def _value_loss_fake(values: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_gradients = rest[-1]
    return (
        values.new_empty(()),
        values.new_empty(len(VALUE_STATS), dtype=torch.float32),
        values.new_empty((num_gradients, *values.shape)),
    )


value_loss = _define(
    "value_loss(Tensor values, Tensor? old_values, Tensor returns, Tensor mask, float? clip, "
    "float? huber, Tensor? normalizer, int num_gradients) "
    "-> (Tensor loss, Tensor metrics, Tensor gradients)",
    "value_loss/value_loss",
    _value_loss_fake,
)

whiten = _define(
    "whiten(Tensor values, Tensor mask) -> (Tensor whitened, Tensor scale)",
    "whiten/whiten",
    lambda values, _: (
        values.new_empty(values.shape),
        values.new_empty((), dtype=torch.float64),
    ),
)

whiten_backward = _define(
    "whiten_backward(Tensor grad_whitened, Tensor whitened, Tensor mask, Tensor scale) -> Tensor",
    "whiten/whiten_backward",
    lambda grad_whitened, whitened, *_: whitened.new_empty(whitened.shape),
)

few_row_linear = _define(
    "few_row_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? scale) -> Tensor",
    "few_row_linear/few_row_linear",
    lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
    impls=("cpp",),
)

quantize_rows = _define(
    "quantize_rows(Tensor weight) -> (Tensor numbers, Tensor scale)",
    "quantize_rows/quantize_rows",
    lambda weight: (
        weight.new_empty(weight.shape, dtype=torch.int8),
        weight.new_empty(weight.shape[:1], dtype=torch.float32),
    ),
    impls=("cpp",),
)

decode_attention = _define(
    "decode_attention(Tensor query, Tensor keys, Tensor values, Tensor lengths, float scaling, "
    "int? window) -> Tensor",
    "decode_attention/decode_attention",
    lambda query, *_: query.new_empty(query.shape),
    impls=("triton",),
)
