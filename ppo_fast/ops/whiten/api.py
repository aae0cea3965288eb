"""whiten: masked mean 0, variance 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops.backends import library
from ppo_fast.ops.backends.dispatch import choose
from ppo_fast.ops.backends.impls import Impl
from ppo_fast.ops.gradient import as_dtype, computed_in, differentiated_once
from ppo_fast.ops.validation import check_tokens
from ppo_fast.ops.whiten import reference


def whiten(values: Tensor, *, mask: Tensor, impl: Impl = "auto") -> Tensor:
    """Shift and scale the valid tokens of a batch to mean 0 and variance 1.

    With n valid tokens x_i over the whole batch, in two passes (never E[x^2] - E[x]^2):

        m = sum(x_i) / n        s2 = sum((x_i - m)^2) / (n - 1)        (x - m) / sqrt(s2 + 1e-8)

    One valid token or none gives zeros. Differentiable. No sync. Source: the released code of
    Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593), which whitens advantages like this
    over all tokens; the n - 1 is the unbiased variance.

    Args:
        values: [B, T] (B sequences, T response tokens), or packed [total], any float dtype.
        mask: bool of the same shape, True at valid tokens; elsewhere output and gradient are
            exactly 0, whatever the values there.
        impl: see ppo_fast.ops.backends.dispatch.

    Returns the shape of ``values``, float64 where ``values`` is float64, else float32.
    Raises TypeError for a wrong dtype, ValueError for differing shapes or devices, and what
    ``dispatch.choose`` raises.
    """
    check_tokens("whiten", {"values": values, "mask": mask}, packed=True)
    if values.ndim == 1:
        return whiten(values[None], mask=mask[None], impl=impl)[0]
    dtype = computed_in(values.dtype)
    chosen = choose("whiten", impl, values.device, dtype).impl
    if chosen == "reference":
        return reference.whiten(values, mask=mask)
    values = as_dtype(values, dtype)
    if torch.is_grad_enabled() and values.requires_grad:
        return _Whiten.apply(values, mask, chosen)
    return library.whiten[chosen](values, mask)[0]


class _Whiten(torch.autograd.Function):
    """The autograd function of the compiled kernels; csrc/kernels/whiten.hpp has the formulas.

    Saves its output, which the caller holds anyway, the mask and the scale. The context is an
    argument of ``forward``: a call with ``setup_context`` is slower.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor, impl: Impl) -> Tensor:
        whitened, scale = library.whiten[impl](values, mask)
        ctx.impl = impl
        ctx.save_for_backward(whitened, mask, scale)
        return whitened

    @staticmethod
    @differentiated_once("whiten")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return library.whiten_backward[ctx.impl](grad, *ctx.saved_tensors), None, None
