"""``logprobs_from_logits``: validation, dispatch and autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast.ops.backends import library
from ppo_fast.ops.backends.dispatch import choose
from ppo_fast.ops.backends.impls import Impl
from ppo_fast.ops.gradient import differentiated_once
from ppo_fast.ops.logprobs import reference
from ppo_fast.ops.validation import (
    check_floating,
    check_int64,
    check_labels_in_range,
    check_mask,
    check_temperature,
)


class TokenLogprobs(NamedTuple):
    """Log-prob and entropy of each token.

    logprobs: [...], log-prob of the label.
    entropy: [...], entropy in nats of the distribution that the label came from; None when it was
        not asked for.
    """

    logprobs: Tensor
    entropy: Tensor | None


def logprobs_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = True,
    impl: Impl = "auto",
) -> TokenLogprobs:
    """Compute the log-prob of each label, and the entropy, under softmax(logits / temperature).

    With x a row of logits, y its label, t the temperature::

        l = x_y / t - log sum_j exp(x_j / t)
        H = -sum_j p_j log p_j,   p = softmax(x / t)

    Both are differentiable with respect to the logits. With a = dL/dl and b = dL/dH::

        dL/dx_j = (1/t) * [ a * (1[j = y] - p_j)  -  b * p_j * (log p_j + H) ]

    (differentiate the two lines above; d log p_j / dx_k = (1[j = k] - p_k) / t.)

    Args:
        logits: [..., V], float32, float64, bfloat16 or float16, any strides. Half precision is
            converted before the softmax. A logit of -inf has p = 0: it adds nothing to H, and its
            gradient is 0 (unless it is the label: then l = -inf, and the formula gives a / t).
            An unmasked row that holds NaN or +inf, or nothing but -inf, gives NaN.
        labels: [...] int64, token ids from 0 to V - 1; any number where mask is False, as -100.
        mask: [...] bool, True at tokens that count. Elsewhere both outputs and the gradient are
            exactly 0, whatever the logits hold there. None: all count.
        temperature: divides the logits; above 0.
        entropy: whether to compute H.
        impl: "auto", "reference", or a compiled implementation (ppo_fast.ops.backends.dispatch).

    Returns:
        TokenLogprobs of [...] float32 tensors (float64 for float64 logits).

    Raises:
        TypeError: logits that are not floating point, labels not int64, a mask not bool.
        ValueError: shapes or devices that do not fit, a temperature outside (0, inf), an unmasked
            label outside [0, V). The last is checked on CPU tensors; on CUDA the check would wait
            for the device, and such a label's log-prob is NaN (with impl="reference" it trips
            PyTorch's device-side assertion).
    """
    check_floating("logits", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected [..., V] with V >= 1")
    check_int64("labels", labels, logits.shape[:-1], logits.device)
    check_mask(mask, labels.shape, logits.device)
    check_temperature(temperature)
    check_labels_in_range(labels, logits.shape[-1], mask)
    chosen = choose("logprobs_from_logits", impl, logits.device, logits.dtype).impl
    if chosen == "reference":
        return TokenLogprobs(
            *reference.logprobs_from_logits(
                logits, labels, mask=mask, temperature=temperature, entropy=entropy
            )
        )
    arguments = (logits, labels, mask, float(temperature), entropy)
    if torch.is_grad_enabled() and logits.requires_grad:
        logprobs, entropies = _Logprobs.apply(*arguments, chosen)
    else:
        logprobs, entropies, _ = library.logprobs_forward[chosen](*arguments)
    return TokenLogprobs(logprobs, entropies if entropy else None)


class _Logprobs(torch.autograd.Function):
    """The autograd function of the compiled kernels.

    Saves the logits, which the caller holds anyway, and at most three numbers a token. The context
    is an argument of ``forward``: a call with ``setup_context`` is slower.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        mask: Tensor | None,
        temperature: float,
        with_entropy: bool,
        impl: Impl,
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy, stats = library.logprobs_forward[impl](
            logits, labels, mask, temperature, with_entropy
        )
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, mask, entropy, stats)
        ctx.temperature, ctx.impl = temperature, impl
        return logprobs, entropy

    @staticmethod
    @differentiated_once("logprobs_from_logits")
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 6
        logits, labels, mask, entropy, stats = ctx.saved_tensors
        grad_logits = library.logprobs_backward[ctx.impl](
            logits, labels, mask, ctx.temperature, entropy, stats, grad_logprobs, grad_entropy
        )
        return grad_logits, None, None, None, None, None
