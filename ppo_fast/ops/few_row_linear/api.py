"""few_row_linear: ``F.linear`` for the few rows of a decoding step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ppo_fast.ops.backends import library
from ppo_fast.ops.backends.dispatch import choose
from ppo_fast.ops.backends.impls import Impl
from ppo_fast.ops.few_row_linear import reference
from ppo_fast.ops.gradient import without_autocast
from ppo_fast.ops.validation import HALF, check_floating, check_same_device

# Up to this many rows the C++ kernel is the faster one in the table of few_row_linear; where the
# BLAS is not made for the processor, also beyond. A constant, not a measurement at run time, so
# that the same seeds give the same bits in every process.
MOST_ROWS = 128


def few_row_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Compute ``y = x W^T + bias``, as ``F.linear``, for the few rows of a decoding step.

    For ``x W^T`` with few rows, the BLAS first copies the whole weight into another layout, at
    every call. The C++ kernel (csrc/kernels/few_row_linear.hpp) reads the weight once, without a
    copy; the reference computes ``(W x^T)^T``, for which the BLAS can do without one too.
    Milliseconds, D = 576, V = 49152, float32, two threads of an AVX2 machine (`make bench`)::

        rows                        1     4     8    16    32    64   128
        C++ kernel                  6     9    11    18    27    52   108
        F.linear                   11    33    42    49    60    88   151
        the transposed product     11     9    13    25    36    63   127

    Beside a float32 x the weight may be in half precision: half the bytes to read. Then x is
    rounded to the weight's dtype, as under autocast; sums and y are float32. Or the weight may be
    in int8 with a scale for each output (``quantize_rows``), a quarter of the bytes; then x is not
    rounded.

    ``impl="auto"`` takes the kernel up to ``MOST_ROWS`` rows and ``F.linear`` above, and on other
    devices; for operands of two dtypes the kernel whatever the number of rows. With the kernel a
    row's bits depend on the row alone; with a product of the BLAS they depend on the number of rows
    too. Differentiable.

    Args:
        x: [..., D], float32, float64, bfloat16 or float16.
        weight: [V, D], the dtype of x; bfloat16, float16 or int8 beside a float32 x.
        bias: [V], the dtype of x, or None.
        scale: float32 [V] for an int8 weight, which stands for ``weight * scale[:, None]``; else
            None. It gets no gradient.
        impl: "auto", "reference", or a compiled implementation (ppo_fast.ops.backends.dispatch).

    Returns:
        [..., V], contiguous, of the dtype of x, also under autocast.

    Raises:
        TypeError: operands that are not floating point, or of different dtypes.
        ValueError: shapes or devices that do not fit.
    """
    check_floating("x", x)
    if weight.ndim != 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected [V, D]")
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, expected [..., {weight.shape[1]}] "
            f"to fit weight {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")
    if (weight.dtype == torch.int8) != (scale is not None):
        raise ValueError(
            f"scale: got {'None' if scale is None else 'a tensor'} with a weight in "
            f"{weight.dtype}; a weight in torch.int8 has a scale for each output, others have none"
        )
    if scale is not None and (scale.shape, scale.dtype) != (weight.shape[:1], torch.float32):
        raise ValueError(
            f"scale: got {scale.dtype} {tuple(scale.shape)}, expected torch.float32 "
            f"({weight.shape[0]},)"
        )
    stored = (*HALF, torch.int8)
    for name, operand in (("weight", weight), ("bias", bias), ("scale", scale)):
        if operand is None:
            continue
        check_same_device(name, operand, x.device)
        mixed = x.dtype == torch.float32 and operand is weight and weight.dtype in stored
        mixed = mixed or operand is scale
        if operand.dtype != x.dtype and not mixed:
            raise TypeError(f"{name}: got {operand.dtype}, expected {x.dtype}, the dtype of x")
    chosen = choose("few_row_linear", impl, x.device).impl
    many_rows = x.numel() > MOST_ROWS * x.shape[-1]
    if impl == "auto" and chosen == "cpp" and many_rows and x.dtype == weight.dtype:
        with without_autocast(x.device):
            return F.linear(x, weight, bias)
    if chosen == "reference":
        return reference.few_row_linear(x, weight, bias, scale)
    operands = [x, weight] if bias is None else [x, weight, bias]
    if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
        return _FewRowLinear.apply(x, weight, bias, scale)
    return library.few_row_linear["cpp"](x, weight, bias, scale)


class _FewRowLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        return library.few_row_linear["cpp"](x, weight, bias, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        rows, w = grad.reshape(-1, weight.shape[0]), weight.to(grad.dtype)
        w = w if scale is None else w * scale[:, None]
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        with without_autocast(x.device):
            return (
                (rows @ w).view(x.shape) if needs_x else None,
                _of_weight(rows, x, weight) if needs_weight else None,
                rows.sum(dim=0) if needs_bias else None,
                None,
            )


def _of_weight(rows: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    used = x.to(weight.dtype).to(x.dtype).reshape(-1, weight.shape[1])
    return (rows.T @ used).to(weight.dtype)
