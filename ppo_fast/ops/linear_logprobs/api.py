"""``linear_logprobs``: validation, dispatch and autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ppo_fast.ops.backends import library
from ppo_fast.ops.backends.dispatch import choose
from ppo_fast.ops.backends.impls import Impl
from ppo_fast.ops.gradient import differentiated_once
from ppo_fast.ops.linear_logprobs import reference
from ppo_fast.ops.logprobs import TokenLogprobs
from ppo_fast.ops.validation import (
    check_floating,
    check_int64,
    check_labels_in_range,
    check_mask,
    check_same_device,
    check_temperature,
)

LOGITS_BUDGET_BYTES = 2**28


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = True,
    logits_budget_bytes: int = LOGITS_BUDGET_BYTES,
    drop_zero_rows: bool = True,
    impl: Impl = "auto",
) -> TokenLogprobs:
    """Compute log-probs and entropy from hidden states and the weight of an LM head.

    They are those of ``logprobs_from_logits`` on the head's logits. With h a hidden state, s the
    logit_scale and c the softcap, the logits are::

        z = s * (W h + bias),   x = c * tanh(z / c)   (x = z without a softcap)

    in this order and both before the temperature, so that x is what transformers returns as
    ``logits``: Cohere scales (``config.logit_scale``; Granite by 1 / ``config.logits_scaling``),
    Gemma 2 caps (``config.final_logit_softcapping``). Log-probs and entropy follow from x / t as
    in ``logprobs_from_logits``, with its gradient dL/dx; and then::

        dz = s * (1 - (x/c)^2) * dL/dx   (s * dL/dx without a softcap)
        dh = W^T dz,   dW = sum over tokens of dz h^T,   dbias = sum over tokens of dz

    Args:
        hidden: [..., D], float32, float64, bfloat16 or float16.
        weight: [V, D], of the same or another of these dtypes. Logits are float32 whatever the
            operands' dtype, also under autocast (float64 if an operand is).
        labels: [...] int64, token ids from 0 to V - 1; anything where mask is False.
        bias: [V] or None.
        mask: [...] bool, True at tokens that count. Elsewhere outputs and gradients are exactly 0,
            whatever hidden holds there. None: all count.
        temperature: divides the logits; above 0.
        logit_scale: factor of the logits.
        softcap: bound of the logits; above 0, or None for no bound.
        entropy: whether to compute the entropy.
        logits_budget_bytes: memory for logits, at least 0. Tiled implementations keep tiles within
            it for the backward and recompute the rest. The reference ignores the budget and makes
            the whole [..., V].
        drop_zero_rows: whether the backward's products leave out rows whose two upstream gradients
            are both 0, as those of clipped tokens are. Only the tiled implementation on the CPU
            does so: on CUDA, finding the rows would wait for the device.
        impl: "auto", "reference", or a compiled implementation (ppo_fast.ops.backends.dispatch).

    Returns:
        TokenLogprobs of [...] float32 tensors (float64 if an operand is).

    Raises:
        TypeError: operands that are not floating point, or a DTensor or another subclass of Tensor
            (gather a sharded weight first: ``weight.full_tensor()``); labels not int64, a mask not
            bool.
        ValueError: shapes or devices that do not fit, a number out of its range, an unmasked label
            outside [0, V) (checked on CPU tensors, see ``logprobs_from_logits``).
    """
    _check_head(hidden, weight, bias)
    check_int64("labels", labels, hidden.shape[:-1], hidden.device)
    check_mask(mask, labels.shape, hidden.device)
    check_temperature(temperature)
    _check_numbers(logit_scale, softcap, logits_budget_bytes)
    check_labels_in_range(labels, weight.shape[0], mask)
    work = torch.promote_types(hidden.dtype, weight.dtype)
    chosen = choose("linear_logprobs", impl, hidden.device, work).impl
    if chosen == "reference":
        return reference.linear_logprobs(
            hidden,
            weight,
            labels,
            bias=bias,
            mask=mask,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            entropy=entropy,
        )
    lead = labels.shape
    arguments = (
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        labels.reshape(-1),
        mask.reshape(-1) if mask is not None else None,
        float(temperature),
        float(logit_scale),
        softcap,
        entropy,
    )
    operands = [x for x in (hidden, weight, bias) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in operands):
        logprobs, entropies = _LinearLogprobs.apply(
            *arguments, logits_budget_bytes, drop_zero_rows, chosen
        )
    else:  # nothing is kept
        logprobs, entropies, _, _ = library.linear_logprobs_forward[chosen](*arguments, 0)
    return TokenLogprobs(logprobs.view(lead), entropies.view(lead) if entropy else None)


class _LinearLogprobs(torch.autograd.Function):
    """The autograd function of the compiled kernels.

    Saves the operands, three numbers a token, and the tiles that the budget allows. The context is
    an argument of ``forward``: a call with ``setup_context`` is slower.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *inputs, ctx.drop_zero_rows, ctx.impl = arguments
        logprobs, entropy, stats, kept = library.linear_logprobs_forward[ctx.impl](*inputs)
        *tensors, temperature, logit_scale, softcap, with_entropy, _ = inputs
        ctx.numbers = temperature, logit_scale, softcap
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, entropy, stats, kept)
        return logprobs, entropy

    @staticmethod
    @differentiated_once("linear_logprobs")
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 12
        *operands, labels, mask, entropy, stats, kept = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        grads = library.linear_logprobs_backward[ctx.impl](
            *operands,
            labels,
            mask,
            *ctx.numbers,
            entropy,
            stats,
            kept,
            grad_logprobs,
            grad_entropy,
            ctx.drop_zero_rows,
            needs,
        )
        return (
            *(grad if need else None for grad, need in zip(grads, needs, strict=True)),
            *(None,) * 9,
        )


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, operand in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if operand is not None:
            _check_plain(name, operand)
            check_floating(name, operand)
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected [V, D] with V >= 1")
    vocab_size, hidden_size = weight.shape
    if hidden.ndim == 0 or hidden.shape[-1] != hidden_size:
        raise ValueError(
            f"hidden: got shape {tuple(hidden.shape)}, expected [..., {hidden_size}] "
            f"to fit weight {tuple(weight.shape)}"
        )
    check_same_device("weight", weight, hidden.device)
    if bias is None:
        return
    if bias.shape != (vocab_size,):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected ({vocab_size},)")
    check_same_device("bias", bias, hidden.device)


def _check_plain(name: str, tensor: Tensor) -> None:
    """Raise TypeError for a DTensor and the like: kernels would take one rank's part for all."""
    if type(tensor) in (Tensor, nn.Parameter, FakeTensor):
        return
    raise TypeError(
        f"{name}: got a {type(tensor).__name__}, expected a plain tensor; gather or unwrap it "
        f"first, e.g. a DTensor with {name}.full_tensor()"
    )


def _check_numbers(logit_scale: float, softcap: float | None, logits_budget_bytes: int) -> None:
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"logit_scale: got {logit_scale}, expected a finite number")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: got {softcap}, expected a finite number above 0, or None")
    if logits_budget_bytes < 0:
        raise ValueError(f"logits_budget_bytes: got {logits_budget_bytes}, expected 0 or more")
