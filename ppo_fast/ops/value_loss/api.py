"""value_loss: squared or Huber error of the value model, optionally clipped."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.ops.backends import library
from ppo_fast.ops.backends.dispatch import choose
from ppo_fast.ops.backends.impls import Impl
from ppo_fast.ops.gradient import as_dtype, computed_in, constant, constant_or_none, with_gradients
from ppo_fast.ops.validation import check_normalizer, check_number, check_tokens
from ppo_fast.ops.value_loss import reference


class ValueLoss(NamedTuple):
    """The loss and its metrics."""

    loss: Tensor
    """0-dim, float32 (float64 for float64 values)."""
    metrics: Tensor
    """[K] float32, detached: layout stats.VALUE_STATS, read by stats.value_metrics."""


def value_loss(
    values: Tensor,
    *,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    clip: float | None = None,
    huber: float | None = None,
    normalizer: float | Tensor | None = None,
    impl: Impl = "auto",
) -> ValueLoss:
    """Compute half the squared error of the values, clipped near the rollout's values by ``clip``.

        v_c  = clamp(v, old - clip, old + clip)          (= old + clamp(v - old, -clip, clip))
        h(e) = 1/2 e^2 where |e| <= huber, else huber (|e| - huber / 2)       Huber 1964
        loss = sum max(h(v - R), h(v_c - R)) / normalizer          over the valid tokens
        d/dv = clamp(v - R, -huber, huber) / normalizer, 0 where h(v_c - R) is the larger one

    Source of the clipped form: the released code of Schulman et al. 2017 (OpenAI baselines, ppo2);
    of h: https://doi.org/10.1214/aoms/1177703732.
    Where both errors are equal the gradient is that of the unclipped one.

    Args:
        values: [B, T] (B sequences, T response tokens), or packed [total] like all others here,
            any float dtype; the gradient flows here.
        old_values: [B, T], the values of the rollout, a constant; None is allowed without ``clip``.
        returns: [B, T], the targets R, a constant.
        mask: bool [B, T], True at valid tokens; the others contribute exactly 0 to loss, gradient
            and metrics, whatever the values there.
        clip: half the width of the trusted range, above 0. Default: None, no clip.
        huber: size of the errors from which the loss grows linearly, above 0. Default: None, the
            squared error everywhere.
        normalizer: divisor of the sum: the number of valid tokens of the whole optimizer
            step, so that the losses of its microbatches add up to the loss of the step. A number
            above 0 or a 0-dim tensor (a constant, not read on the host; 0 counts as 1, since a step
            without tokens has loss 0). Default: the valid tokens of this call, at least 1.
        impl: see ppo_fast.ops.backends.dispatch.

    The maths is float32 (float64 where ``values`` is float64). No sync.
    Raises TypeError for a wrong dtype; ValueError for differing shapes or devices, a clip, huber
    or normalizer out of range and ``clip`` without ``old_values``; and what ``dispatch.choose``
    raises.
    """
    op = "value_loss"
    required = {"values": values, "returns": returns, "mask": mask}
    check_tokens(op, required, {"old_values": old_values}, packed=True)
    if values.ndim == 1:  # no number depends on the rows
        values, returns, mask = values[None], returns[None], mask[None]
        old_values = None if old_values is None else old_values[None]
    check_normalizer(op, normalizer)
    if huber is not None:
        check_number(op, "huber", huber, above=0)
    if clip is not None:
        check_number(op, "clip", clip, above=0)
        if old_values is None:
            raise ValueError(f"{op}: clip is {clip} but old_values is None; give old_values [B, T]")
    chosen = choose(op, impl, values.device, values.dtype).impl
    if chosen == "reference":
        return ValueLoss(
            *reference.value_loss(
                values,
                old_values=old_values,
                returns=returns,
                mask=mask,
                clip=clip,
                huber=huber,
                normalizer=normalizer,
            )
        )
    dtype = computed_in(values.dtype)
    values = as_dtype(values, dtype)
    num_gradients = int(torch.is_grad_enabled() and values.requires_grad)
    loss, metrics, gradients = library.value_loss[chosen](
        constant(values, dtype),
        constant_or_none(old_values, dtype),
        constant(returns, dtype),
        mask,
        clip,
        huber,
        float(normalizer) if isinstance(normalizer, int) else normalizer,
        num_gradients,
    )
    if num_gradients > 0:
        loss = with_gradients("value_loss", loss, gradients, values)
    return ValueLoss(loss, metrics)
