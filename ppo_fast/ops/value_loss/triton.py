"""The Triton kernel of value_loss, and its launcher.

csrc/kernels/value_loss.hpp states the formulas. One pass over the tokens writes the gradient, and
the loss and the statistics of each program; reduce_partials combines the programs. Bytes moved a
token: 9, and 4 each for old_values and the gradient. Saved for backward: the gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops.backends.triton_launch import Launch, kernel, launch
from ppo_fast.ops.backends.triton_reduce import (
    VEC,
    added,
    contiguous_or_none,
    empty_partials,
    larger,
    largest,
    normalizer_of,
    on_device,
    reduce_partials,
    smaller,
    smallest,
    store_column,
    tokens_end,
)
from ppo_fast.ops.stats import VALUE_STATS

LAUNCH = Launch(512, 4, registers=56)  # 16 bytes a thread of each input


@triton.jit
def twice_error(error, huber, HUBER: tl.constexpr):
    """Twice the error term: the square, or beyond ``huber`` a line."""
    squared = error * error
    if HUBER:
        size = tl.abs(error)
        squared = tl.where(size <= huber, squared, huber * (2.0 * size - huber))
    return squared


@kernel
def value_loss_kernel(
    values,  # float32 [N], as all of the inputs
    old_values,  # or None: no clip
    returns,
    mask,  # bool [N]
    normalizer,  # float32 [1], or None: normalizer_number
    grad_values,  # out, float32 [N], or None
    partials,  # out, float32 [1 + K, P]: the loss before the normalizer, and VALUE_STATS
    num_tokens: tl.int64,
    clip: tl.float32,
    huber: tl.float32,
    normalizer_number: tl.float32,
    HUBER: tl.constexpr,  # else the squared error
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Inputs are masked, not results."""
    end = tokens_end(num_tokens, ALIGNED)
    weight = 1.0 / normalizer_of(normalizer, normalizer_number)
    sums = (tl.zeros([BLOCK // VEC], tl.float32),) * 9
    value_min = tl.full([BLOCK], float("inf"), tl.float32)
    value_max = tl.full([BLOCK], float("-inf"), tl.float32)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, end, stride):
        token = first + tl.arange(0, BLOCK)
        exists = token < end
        valid = tl.load(mask + token, mask=exists, other=0) != 0
        v = tl.where(valid, tl.load(values + token, mask=exists, other=0.0), 0.0)
        target = tl.where(valid, tl.load(returns + token, mask=exists, other=0.0), 0.0)
        error = v - target
        squared = error * error
        worst = twice_error(error, huber, HUBER)
        slope = error
        if HUBER:
            slope = tl.where(error < -huber, -huber, error)
            slope = tl.where(slope > huber, huber, slope)
        clipped = tl.zeros([BLOCK], tl.int1)
        if old_values is not None:
            old = tl.where(valid, tl.load(old_values + token, mask=exists, other=0.0), 0.0)
            # Not old + clamp(v - old): within the range this is v to the bit.
            floor = old - clip
            ceiling = old + clip
            near = tl.where(v < floor, floor, v)
            near = twice_error(tl.where(near > ceiling, ceiling, near) - target, huber, HUBER)
            clipped = near > worst
            worst = tl.where(clipped, near, worst)
            slope = tl.where(clipped, 0.0, slope)
        if grad_values is not None:
            tl.store(grad_values + token, tl.where(valid, slope * weight, 0.0), mask=exists)

        # The loss, and the sums of VALUE_STATS in their order.
        loss = 0.5 * worst
        terms = (loss, valid, loss, clipped, v, target, target * target, -error, squared)
        sums = added(sums, terms)
        value_min = smaller(value_min, v, valid)
        value_max = larger(value_max, v, valid)
    store_column(partials, sums, (smallest(value_min), largest(value_max)))


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    clip: float | None,
    huber: float | None,
    normalizer: float | Tensor | None,
    num_gradients: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same as cpp.value_loss on a GPU, in float32."""
    device, num_tokens = values.device, values.numel()
    mask = mask.contiguous()
    normalizer, number = on_device(mask.sum() if normalizer is None else normalizer, device)
    gradients = torch.empty(num_gradients, *values.shape, dtype=torch.float32, device=device)
    partials = empty_partials(num_tokens, LAUNCH, VALUE_STATS, device)
    launch(
        value_loss_kernel,
        partials.shape[1],
        LAUNCH,
        device,
        values.contiguous(),
        None if clip is None else contiguous_or_none(old_values),
        returns.contiguous(),
        mask,
        normalizer,
        gradients[0] if num_gradients > 0 else None,
        partials,
        num_tokens,
        0.0 if clip is None else clip,
        0.0 if huber is None else huber,
        number,
        HUBER=huber is not None,
        ALIGNED=num_tokens % VEC.value == 0,
    )
    return *reduce_partials(partials, VALUE_STATS, normalizer, number), gradients
