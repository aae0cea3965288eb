"""kl_estimate: per-token estimates of the KL divergence between two policies."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ppo_fast.ops.backends import library
from ppo_fast.ops.backends.dispatch import choose
from ppo_fast.ops.backends.impls import Impl
from ppo_fast.ops.gradient import as_dtype, computed_in, differentiated_once
from ppo_fast.ops.kl_estimate import reference
from ppo_fast.ops.validation import check_choice, check_tokens

KLEstimator = Literal["k1", "abs", "k2", "k3", "k1+k2"]

# Names in the kernels: that of a KLEstimator, and of k3 with its clamps.
ESTIMATORS = (*get_args(KLEstimator), "k3 clamped")


def clamped(estimator: str, clamp: bool) -> str:
    """Return the kernels' name of an estimator with or without its clamps, which only k3 has."""
    return "k3 clamped" if clamp and estimator == "k3" else estimator


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    mask: Tensor | None = None,
    estimator: KLEstimator = "k1",
    clamp: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Estimate KL(policy || reference) at every token from the log-probs of the sampled tokens.

    With d = logprobs - ref_logprobs, the tokens being drawn from the policy:

        k1     d                     unbiased value; the expected gradient of its sample is zero
        abs    |d|
        k2     d^2 / 2               biased value; the gradient of the true KL in expectation
        k3     exp(-d) - 1 + d       unbiased value, never negative
        k1+k2  value of k1, gradient of k2

    Source: Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html.
    Differentiable in both log-probs, under "k1+k2" in ``logprobs`` alone (``ref_logprobs`` is a
    constant there); the gradient of |d| at 0 is 0. Without ``clamp``, k3 is inf from 88 nats on in
    float32.

    Args:
        logprobs: [B, T] (B sequences, T response tokens), or packed [total] like all others here,
            any float dtype: of the policy.
        ref_logprobs: [B, T]: of the reference policy.
        mask: bool [B, T], True at valid tokens; elsewhere the estimate and both gradients are
            exactly 0, whatever the values there. Default: all valid.
        estimator: one of the names above. Default: "k1".
        clamp: for k3: clamp d to [-20, 20], then k3 to at most 10 (reached at d = -2.6 and at
            d = 11), with gradient 0 beyond, as verl does. Default: False.
        impl: see ppo_fast.ops.backends.dispatch.

    Returns the shape of ``logprobs``, float64 where ``logprobs`` is float64, else float32.
    Raises TypeError for a wrong dtype; ValueError for differing shapes or devices and an unknown
    estimator; and what ``dispatch.choose`` raises.
    """
    op = "kl_estimate"
    required = {"logprobs": logprobs, "ref_logprobs": ref_logprobs}
    check_tokens(op, required, {"mask": mask}, packed=True)
    check_choice(op, "estimator", estimator, get_args(KLEstimator))
    name = clamped(estimator, clamp)
    chosen = choose(op, impl, logprobs.device, logprobs.dtype).impl
    if chosen == "reference":
        return reference.kl_estimate(logprobs, ref_logprobs, mask=mask, estimator=name)
    dtype = computed_in(logprobs.dtype)
    logprobs, ref_logprobs = as_dtype(logprobs, dtype), as_dtype(ref_logprobs, dtype)
    if estimator == "k1+k2":
        ref_logprobs = ref_logprobs.detach()
    if torch.is_grad_enabled() and (logprobs.requires_grad or ref_logprobs.requires_grad):
        return _KLEstimate.apply(logprobs, ref_logprobs, mask, name, chosen)
    return library.kl_estimate[chosen](logprobs, ref_logprobs, mask, name, False)[0]


class _KLEstimate(torch.autograd.Function):
    """The autograd function of the compiled kernels. Saves its inputs and the slope.

    The context is an argument of ``forward``: a call with ``setup_context`` is slower.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        ref_logprobs: Tensor,
        mask: Tensor | None,
        estimator: str,
        impl: Impl,
    ) -> Tensor:
        estimate, slope = library.kl_estimate[impl](logprobs, ref_logprobs, mask, estimator, True)
        ctx.save_for_backward(mask, slope, logprobs, ref_logprobs)
        return estimate

    @staticmethod
    @differentiated_once("kl_estimate")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, slope, *_ = ctx.saved_tensors
        grad = grad * slope
        if mask is not None:
            grad = torch.where(mask, grad, 0.0)
        for_logprobs, for_ref, *_ = ctx.needs_input_grad
        return grad if for_logprobs else None, -grad if for_ref else None, None, None, None
