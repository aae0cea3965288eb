"""ppo_loss: the policy objectives with their KL term and entropy bonus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ppo_fast.ops.backends import library
from ppo_fast.ops.backends.dispatch import choose
from ppo_fast.ops.backends.impls import Impl
from ppo_fast.ops.gradient import (
    as_dtype,
    computed_in,
    constant,
    constant_or_none,
    with_gradients,
)
from ppo_fast.ops.kl_estimate.api import KLEstimator, clamped
from ppo_fast.ops.packed import Packing
from ppo_fast.ops.ppo_loss import reference
from ppo_fast.ops.validation import check_choice, check_normalizer, check_number, check_tokens

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "token-sum"]
Ratio = Literal["token", "sequence", "sequence-product"]
Objective = Literal["clip", "cispo", "mask"]


class PPOLoss(NamedTuple):
    """The loss and its metrics."""

    loss: Tensor
    """0-dim, float32 (float64 for float64 log-probs)."""
    metrics: Tensor
    """[K] float32, detached: layout stats.PPO_STATS, read by stats.ppo_metrics."""


def ppo_loss(
    logprobs: Tensor,
    *,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    ratio: Ratio = "token",
    objective: Objective = "clip",
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k1+k2",
    kl_clamp: bool = True,
    entropy_coef: float = 0.0,
    aggregation: Aggregation = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
) -> PPOLoss:
    """Compute the loss of a policy update on sampled tokens, to be minimised.

    Per valid token, with r = exp(logprobs - old_logprobs), A the advantage, (low, high) = clip:

        policy = -min(r A, clamp(r, 1 - low, 1 + high) A)             Schulman et al. 2017, eq. 7
        policy = -max(min(r A, clamp(r, 1 - low, 1 + high) A), c A)   for A < 0 with c = dual_clip;
                                                                      Ye et al. 2020, eq. 5
        loss   = weight * policy + kl_coef * KL(policy || reference) - entropy_coef * entropy

    (https://arxiv.org/abs/1707.06347, https://arxiv.org/abs/1912.09729; the KL estimators are those
    of kl_estimate.) Clipping is decided on log r, against log(1 + high), log(1 - low) and log(c);
    a token exactly on a bound is not clipped. The gradient per token is

        d/dlogprobs = weight [not clipped] (-r A) + kl_coef dKL/dlogprobs
        d/dentropy  = -entropy_coef

    and exactly 0 at a clipped token without KL, however extreme r is. Without ``dual_clip`` the
    policy term is unbounded for A < 0 and overflows to inf at log r > 88 in float32.

    Other objectives have other policy terms, bounded for both signs of A:

        "cispo"  policy = -constant(clamp(r, 1 - low, 1 + high)) A logprobs     MiniMax-M1, eq. 4-5
                 d/dlogprobs = -clamp(r, 1 - low, 1 + high) A
        "mask"   policy = -r A where 1 - low <= r <= 1 + high, else 0           as in SAO's DIS
                 d/dlogprobs = policy

    (https://arxiv.org/abs/2506.13585, https://arxiv.org/abs/2607.07508.) With another ``ratio``, r
    is the ratio of the token's sequence, and its derivative in the token's log-prob is r too:

        "sequence"          r = exp(mean over the row's valid tokens of (logprobs - old_logprobs))
        "sequence-product"  r = exp(sum over the row's valid tokens of (logprobs - old_logprobs))

    The first is GSPO-token (Zheng et al. 2025, eq. 14-17, https://arxiv.org/abs/2507.18071). Where
    a sequence has one advantage, its gradient with "seq-mean-token-mean" is that of the objective
    of whole sequences; with the product so is that of "seq-mean-token-sum", the normalizer being
    the number of sequences.

    The terms of the tokens are aggregated as

        "token-mean"            sum over tokens / normalizer = the valid tokens of the step
        "seq-mean-token-mean"   sum over sequences of their token means / normalizer = the sequences
                                of the step that have a valid token
        "seq-mean-token-sum"    sum over tokens / normalizer = sequences times a constant length
        "token-sum"             sum over tokens / normalizer, 1 if not given

    so that, with the normalizer of the whole optimizer step, the losses of its microbatches (whole
    sequences each) add up to the loss of the step, and merge_stats of their metrics to its metrics.

    Args:
        logprobs: [B, T] (B sequences, T response tokens), or packed [total] like all others here,
            any float dtype: of the sampled tokens under the policy being trained; the gradient
            flows here.
        old_logprobs: [B, T]: the same under the policy before the update; a constant.
        advantages: [B, T]; a constant.
        mask: bool [B, T], True at valid tokens; the others contribute exactly 0 to loss, gradient
            and metrics, whatever the values there.
        entropy: [B, T], of the policy at each token, with its gradient. Needed for
            ``entropy_coef``; without a coefficient it is a metric only. Default: None.
        ref_logprobs: [B, T]: under the reference policy; a constant. Needed for ``kl_coef``;
            without a coefficient it is a metric only. Default: None.
        weights: [B, T], importance weights of the policy terms; a constant. KL and entropy are not
            weighted. A token of weight 0 has no policy term, however extreme r is. (Truncated
            importance sampling: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
            Off-Policy RL Training".) Default: None, all 1.
        ratio: "token", "sequence" or "sequence-product", see above. Metrics of ratios (approx_kl,
            approx_kl_k3, ratio_*, max_log_ratio) stay those of the tokens' own; tokens count as
            clipped by the ratio that is used. Default: "token".
        objective: "clip", "cispo" or "mask", see above. The last two count tokens as clipped
            wherever r is out of bounds, for both signs of A. Default: "clip".
        clip: (low, high), 0 <= low < 1 and high > 0. Default: (0.2, 0.2).
        dual_clip: c > 1, for the objective "clip" alone. Default: None, no dual clip.
        kl_coef: weight of the KL term, at least 0. Default: 0.
        kl_estimator: see kl_estimate. "k1" is refused with a ``kl_coef``: its expected gradient is
            zero. Default: "k1+k2".
        kl_clamp: as kl_estimate's ``clamp``: k3 is at most 10, with gradient 0 beyond; the other
            estimators have no clamp. Default: True.
        entropy_coef: weight of the entropy bonus. Default: 0.
        aggregation: one of the names above. Default: "token-mean".
        normalizer: a number above 0 or a 0-dim tensor (a constant, not read on the host; 0 counts
            as 1, since a step without tokens has loss 0). Default: the count in this call, at
            least 1; 1 with "token-sum"; required with "seq-mean-token-sum".
        cu_seqlens: [B + 1] int32 or int64 on the CPU: packed sequence i is [cu_seqlens[i],
            cu_seqlens[i + 1]). Needed for packed tensors with "seq-mean-token-mean" and with
            ratios of sequences.
        impl: see ppo_fast.ops.backends.dispatch.

    The maths is float32 (float64 where ``logprobs`` is float64). No sync.
    Raises TypeError for a wrong dtype; ValueError for differing shapes or devices, a number out of
    range, an unknown name, a coefficient without its tensor and a dual clip of another objective;
    and what ``dispatch.choose``
    raises.
    """
    op = "ppo_loss"
    required = {
        "logprobs": logprobs,
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "mask": mask,
    }
    optional = {"entropy": entropy, "ref_logprobs": ref_logprobs, "weights": weights}
    check_tokens(op, required, optional, packed=True)
    check_choice(op, "ratio", ratio, get_args(Ratio))
    check_choice(op, "objective", objective, get_args(Objective))
    _check_clip(op, clip, dual_clip, objective)
    _check_terms(op, kl_coef, kl_estimator, ref_logprobs, entropy_coef, entropy)
    normalizer = _checked_normalizer(op, aggregation, normalizer)
    if logprobs.ndim == 1:
        rows = _rows_of_packed(op, cu_seqlens, logprobs, aggregation, ratio)
        logprobs, old_logprobs, advantages = map(rows, (logprobs, old_logprobs, advantages))
        mask, entropy, ref_logprobs, weights = map(rows, (mask, entropy, ref_logprobs, weights))
    elif cu_seqlens is not None:
        raise ValueError(
            f"{op}: cu_seqlens is for packed tensors [total], got logprobs {list(logprobs.shape)}"
        )
    estimator = clamped(kl_estimator, kl_clamp)
    chosen = choose(op, impl, logprobs.device, logprobs.dtype).impl
    if chosen == "reference":
        return PPOLoss(
            *reference.ppo_loss(
                logprobs,
                old_logprobs=old_logprobs,
                advantages=advantages,
                mask=mask,
                entropy=entropy,
                ref_logprobs=ref_logprobs,
                weights=weights,
                ratio=ratio,
                objective=objective,
                clip=clip,
                dual_clip=dual_clip,
                kl_coef=kl_coef,
                kl_estimator=estimator,
                entropy_coef=entropy_coef,
                aggregation=aggregation,
                normalizer=normalizer,
            )
        )
    dtype = computed_in(logprobs.dtype)
    logprobs = as_dtype(logprobs, dtype)
    entropy = None if entropy is None else as_dtype(entropy, dtype)
    num_gradients = 0  # 0: none; 1: of the log-probs; 2: of the entropy too
    if torch.is_grad_enabled():
        if entropy is not None and entropy_coef != 0 and entropy.requires_grad:
            num_gradients = 2
        elif logprobs.requires_grad:
            num_gradients = 1
    loss, metrics, gradients = library.ppo_loss[chosen](
        constant(logprobs, dtype),
        constant_or_none(entropy, dtype),
        constant(old_logprobs, dtype),
        constant(advantages, dtype),
        constant_or_none(ref_logprobs, dtype),
        constant_or_none(weights, dtype),
        mask,
        ratio,
        objective,
        *clip,
        dual_clip,
        float(kl_coef),
        estimator,
        float(entropy_coef),
        aggregation,
        float(normalizer) if isinstance(normalizer, int) else normalizer,
        num_gradients,
    )
    if num_gradients > 0:
        loss = with_gradients(op, loss, gradients, logprobs, entropy)
    return PPOLoss(loss, metrics)


def _checked_normalizer(
    op: str, aggregation: str, normalizer: float | Tensor | None
) -> float | Tensor | None:
    """Return the normalizer; None where the tokens or sequences of this call are to be counted."""
    check_choice(op, "aggregation", aggregation, get_args(Aggregation))
    check_normalizer(op, normalizer)
    if aggregation == "seq-mean-token-sum" and normalizer is None:
        raise ValueError(
            f"{op}: aggregation 'seq-mean-token-sum' needs a normalizer: the number of sequences "
            "of the step times a constant length"
        )
    return 1.0 if aggregation == "token-sum" and normalizer is None else normalizer


def _rows_of_packed(
    op: str, cu_seqlens: Tensor | None, logprobs: Tensor, aggregation: str, ratio: str
) -> Callable[[Tensor | None], Any]:
    """Return the function that makes rows [B, T] of a packed tensor [total]; None stays None."""
    packing = None if cu_seqlens is None else Packing(op, cu_seqlens, logprobs)
    if aggregation != "seq-mean-token-mean" and ratio == "token":  # no number depends on the rows
        return lambda x: None if x is None else x[None]
    if packing is None:
        option = f"aggregation {aggregation!r}" if ratio == "token" else f"ratio {ratio!r}"
        raise ValueError(
            f"{op}: {option} of packed tensors {list(logprobs.shape)} needs cu_seqlens, the "
            "borders of the sequences"
        )
    return packing.pad


def _check_clip(
    op: str, clip: tuple[float, float], dual_clip: float | None, objective: str
) -> None:
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise TypeError(f"{op}: clip is {clip!r}, expected (low, high), such as clip=(0.2, 0.2)")
    check_number(op, "the low end of clip", clip[0], at_least=0, below=1)
    check_number(op, "the high end of clip", clip[1], above=0)
    if dual_clip is not None:
        check_number(op, "dual_clip", dual_clip, above=1)
        if objective != "clip":
            raise ValueError(
                f"{op}: dual_clip is {dual_clip} but the objective {objective!r} has no dual clip; "
                "leave it out, or use objective='clip'"
            )


def _check_terms(
    op: str,
    kl_coef: float,
    kl_estimator: str,
    ref_logprobs: Tensor | None,
    entropy_coef: float,
    entropy: Tensor | None,
) -> None:
    check_number(op, "kl_coef", kl_coef, at_least=0)
    check_choice(op, "kl_estimator", kl_estimator, get_args(KLEstimator))
    if kl_coef > 0 and ref_logprobs is None:
        raise ValueError(f"{op}: kl_coef is {kl_coef} but ref_logprobs is None; give it [B, T]")
    if kl_coef > 0 and kl_estimator == "k1":
        raise ValueError(
            f"{op}: kl_estimator 'k1' as a loss term has an expected gradient of zero, so "
            "that it has no effect; use 'k1+k2', which has the same value"
        )
    check_number(op, "entropy_coef", entropy_coef)
    if entropy_coef != 0 and entropy is None:
        raise ValueError(
            f"{op}: entropy_coef is {entropy_coef} but entropy is None; give it [B, T]"
        )
