"""``linear_logprobs`` on the GPU, a tile of the vocabulary at a time.

The BLAS computes the products; Triton kernels do the rest, by the formulas of
csrc/kernels/linear_logprobs.hpp.

A tile is the products W h of all N rows with some columns of the vocabulary, float32 whatever the
operands' dtype. Going over the vocabulary reads each slice of the weight once a product and writes
each slice of its gradient once; each tile adds to the gradient of hidden once, in float32. Bytes
that the kernels move a logit: 4 forward; backward 8, or 6 with half precision operands. Saved for
backward: 12 bytes a token, and the tiles that the budget allows.

The host does not know how many rows count, so masked rows take part in the products; the kernels do
not read them. Products of float32 operands are as exact as ``torch.set_float32_matmul_precision``
says.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops.backends.triton_launch import Launch, kernel, launch
from ppo_fast.ops.linear_logprobs.triton_tiles import (
    VEC,
    Scratch,
    add_product,
    columns_of,
    head_of,
    multiply,
    pitch_of,
    tiles_of,
)
from ppo_fast.ops.logprobs.triton import (
    LOG2_E,
    LOG_2,
    gradient_coefficients,
    logit_gradient,
    moved_sums,
    softmax_fold,
    store_masked_row,
    upstream_of,
)

# A block is two loads of 16 bytes a thread. FOLD: an SM runs eight programs, each with its next
# block in flight: 32 KB, as much as an H200 needs. (With a softcap, blocks of 2048 would take 79
# registers.)
FOLD = Launch(1024, 4, registers=64)
GRADIENT = Launch(2048, 8, registers=48)


@triton.jit
def tanh(x):
    """As csrc/base/math.hpp; Triton's own is not in its interpreter."""
    square = x * x
    p = -6.096299737691879e-3
    p = p * square + 2.099689468741417e-2
    p = p * square - 5.3850848227739334e-2
    p = p * square + 0.1333276927471161
    p = p * square - 0.333333283662796
    near = x * square * p + x
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2_E)) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def logit_of(product, bias, logit_scale, softcap, CAPPED: tl.constexpr):
    """x from W h, and dx / d(W h); see LogitTile in csrc/kernels/linear_logprobs.hpp."""
    z = (product + bias) * logit_scale
    if CAPPED:
        share = tanh(z * (1.0 / softcap))
        x = softcap * share
        slope = logit_scale * (1.0 - share * share)
    else:
        x = z
        slope = logit_scale
    return x, slope


@kernel
def fold_tile_kernel(
    products,  # float32 [N, width], rows a multiple of VEC apart
    bias,  # float32 [width] and as many more, or None
    labels,  # int64 [N]
    mask,  # bool [N], or None
    logprobs,  # out, float32 [N]; until the last tile: the label's logit, NaN before it is seen
    entropies,  # out, float32 [N]; until then: the weighted sum. Untouched without ENTROPY
    stats,  # out, float32 [N, 2]: the maximum m and sum_j exp((x_j - m) / t) so far
    width: tl.int64,
    first_token: tl.int64,
    vocab_size: tl.int64,
    logit_scale: tl.float32,
    softcap: tl.float32,
    inverse_temperature: tl.float32,
    ENTROPY: tl.constexpr,
    CAPPED: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    counts = True if mask is None else tl.load(mask + row) != 0
    if not counts:
        store_masked_row(row, logprobs, entropies, stats, ENTROPY)
        return
    scale = inverse_temperature * LOG2_E
    begun = first_token > 0
    before = tl.load(stats + 2 * row, mask=begun, other=float("-inf"))
    total_before = tl.load(stats + 2 * row + 1, mask=begun, other=0.0)
    weighted_before = 0.0
    if ENTROPY:
        weighted_before = tl.load(entropies + row, mask=begun, other=0.0)

    # Numbers are loaded beyond the width, up to the next row; they are not used.
    pitch = (width + VEC - 1) // VEC * VEC
    start = products + row * pitch
    maximum = before
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    lane = tl.arange(0, BLOCK)
    ahead = tl.load(start + lane, mask=lane < pitch, other=0.0)
    for first in range(0, pitch, BLOCK):
        product = ahead
        column = first + lane
        following = column + BLOCK  # on their way while this block is folded
        ahead = tl.load(start + following, mask=following < pitch, other=0.0)
        offset = 0.0
        if bias is not None:
            offset = tl.load(bias + column, mask=column < pitch, other=0.0)
        x, _ = logit_of(product, offset, logit_scale, softcap, CAPPED)
        x = tl.where(column < width, x, float("-inf"))
        maximum, total, weighted = softmax_fold(x, maximum, total, weighted, scale, ENTROPY)
    moved_total, moved_weighted = moved_sums(total_before, weighted_before, before, maximum, scale)
    sum_total = tl.sum(total, 0) + moved_total
    sum_weighted = tl.sum(weighted, 0) + moved_weighted

    at = tl.load(labels + row) - first_token
    is_here = (at >= 0) & (at < width)
    product_at = tl.load(start + at, mask=is_here, other=0.0)
    offset_at = 0.0
    if bias is not None:
        offset_at = tl.load(bias + at, mask=is_here, other=0.0)
    chosen, _ = logit_of(product_at, offset_at, logit_scale, softcap, CAPPED)
    # A label that is no token stays NaN: the public function cannot look at labels on a GPU.
    chosen_before = tl.load(logprobs + row, mask=begun, other=float("nan"))
    chosen = tl.where(is_here, chosen, chosen_before)

    tl.store(stats + 2 * row, maximum)
    tl.store(stats + 2 * row + 1, sum_total)
    if first_token + width < vocab_size:
        tl.store(logprobs + row, chosen)
        if ENTROPY:
            tl.store(entropies + row, sum_weighted)
    else:
        log_total = tl.log(sum_total)
        tl.store(logprobs + row, (chosen - maximum) * inverse_temperature - log_total)
        if ENTROPY:
            tl.store(entropies + row, log_total - LOG_2 * sum_weighted / sum_total)


@kernel
def tile_gradient_kernel(
    products,  # float32 [N, width], rows a multiple of VEC apart
    bias,  # float32 [width] and as many more, or None
    labels,  # int64 [N]
    mask,  # bool [N], or None
    entropies,  # float32 [N]; read with grad_entropy
    stats,  # float32 [N, 2]
    grad_logprobs,  # float32 [N], a; or None: 0
    grad_entropy,  # float32 [N], b; or None: 0
    gradient,  # out, dL/d(W h), of the operands' dtype, laid out as products; may be products
    width: tl.int64,
    first_token: tl.int64,
    parts: tl.int64,
    logit_scale: tl.float32,
    softcap: tl.float32,
    inverse_temperature: tl.float32,
    CAPPED: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``parts`` programs a row, a block of columns each."""
    row = (tl.program_id(0) // parts.to(tl.int32)).to(tl.int64)
    part = (tl.program_id(0) % parts.to(tl.int32)).to(tl.int64)
    a, b = upstream_of(row, mask, grad_logprobs, grad_entropy)

    pitch = (width + VEC - 1) // VEC * VEC
    column = part * BLOCK + tl.arange(0, BLOCK)
    inside = column < pitch
    to = gradient + row * pitch + column
    if (a == 0.0) & (b == 0.0):
        tl.store(to, tl.zeros([BLOCK], tl.float32).to(gradient.dtype.element_ty), mask=inside)
        return
    maximum = tl.load(stats + 2 * row)
    total = tl.load(stats + 2 * row + 1)
    entropy = 0.0
    if grad_entropy is not None:
        entropy = tl.load(entropies + row)
    c0, c1 = gradient_coefficients(a, b, entropy, total, inverse_temperature)
    scale = inverse_temperature * LOG2_E
    at = tl.load(labels + row) - first_token

    product = tl.load(products + row * pitch + column, mask=inside, other=0.0)
    offset = 0.0
    if bias is not None:
        offset = tl.load(bias + column, mask=inside, other=0.0)
    x, slope = logit_of(product, offset, logit_scale, softcap, CAPPED)
    of_logit = logit_gradient(x, column, at, maximum, scale, c0, c1, a * inverse_temperature)
    tl.store(to, (of_logit * slope).to(gradient.dtype.element_ty), mask=inside)


@torch.no_grad()
def linear_logprobs_forward(
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
    """Compute the same as cpp.linear_logprobs_forward on a GPU; kept tiles are products W h."""
    head = head_of(hidden, weight, bias)
    n, vocab_size, device = len(hidden), len(weight), hidden.device
    kept = torch.empty(min(n * vocab_size, budget_bytes // 4), dtype=torch.float32, device=device)
    logprobs = torch.empty(n, dtype=torch.float32, device=device)
    stats = torch.empty(n, 2, dtype=torch.float32, device=device)
    entropy = torch.empty(n if with_entropy else 0, dtype=torch.float32, device=device)
    hidden, labels = hidden.to(head.operands).contiguous(), labels.contiguous()
    mask = mask if mask is None else mask.contiguous()
    columns = columns_of(n, head)
    tiles = list(tiles_of(n, vocab_size, columns, kept))
    # The rest is never read. It is zeroed so that equal calls give equal outputs.
    kept[sum(tile.kept.numel() for tile in tiles if tile.kept is not None) :] = 0.0
    scratch = Scratch(n, columns, torch.float32, hidden)
    for tile in tiles:
        products = scratch.tile(tile.width) if tile.kept is None else tile.kept
        multiply(hidden, head.rows(tile).T, products)
        launch(
            fold_tile_kernel,
            n,
            FOLD,
            device,
            products,
            head.bias_of(tile),
            labels,
            mask,
            logprobs,
            entropy,
            stats,
            tile.width,
            tile.first,
            vocab_size,
            logit_scale,
            softcap or 0.0,
            1 / temperature,
            ENTROPY=with_entropy,
            CAPPED=softcap is not None,
            VEC=VEC,
        )
    return logprobs, entropy, stats, kept


@torch.no_grad()
def linear_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    mask: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    entropy: Tensor,
    stats: Tensor,
    kept: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    drop_zero_rows: bool,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same as cpp.linear_logprobs_backward on a GPU.

    ``drop_zero_rows`` is ignored: finding the rows would wait for the device.
    """
    head = head_of(hidden, weight, bias)
    n, device, hidden_dtype = len(hidden), hidden.device, hidden.dtype
    if mask is not None and needs_grad[1]:  # 0 * NaN would reach the gradient of the weight
        hidden = hidden.masked_fill(~mask[:, None], 0.0)
    hidden = hidden.to(head.operands).contiguous()
    of_rows = [
        x if x is None else x.contiguous()
        for x in (labels, mask, entropy, stats, grad_logprobs, grad_entropy)
    ]
    grad_hidden = hidden.new_zeros(hidden.shape if needs_grad[0] else 0, dtype=torch.float32)
    grad_weight = weight.new_empty(weight.shape if needs_grad[1] else 0)
    grad_bias = (weight if bias is None else bias).new_empty(len(weight) if needs_grad[2] else 0)
    columns = columns_of(n, head)
    room = Scratch(n, columns, torch.float32, hidden)
    # Another backward may read a kept tile, and operands of a product have one dtype.
    narrow = Scratch(n, columns, head.operands, hidden)
    for tile in tiles_of(n, len(weight), columns, kept):
        weight_rows, tokens = head.rows(tile), slice(tile.first, tile.first + tile.width)
        products = tile.kept
        if products is None:
            products = room.tile(tile.width)
            multiply(hidden, weight_rows.T, products)
        in_place = tile.kept is None and head.operands == torch.float32
        gradient = products if in_place else narrow.tile(tile.width)
        parts = triton.cdiv(pitch_of(tile.width), GRADIENT.block)
        launch(
            tile_gradient_kernel,
            n * parts,
            GRADIENT,
            device,
            products,
            head.bias_of(tile),
            *of_rows,
            gradient,
            tile.width,
            tile.first,
            parts,
            logit_scale,
            softcap or 0.0,
            1 / temperature,
            CAPPED=softcap is not None,
            VEC=VEC,
        )
        if needs_grad[0]:
            add_product(grad_hidden, gradient, weight_rows)
        if needs_grad[1]:
            multiply(gradient.T, hidden, grad_weight[tokens])
        if needs_grad[2]:
            grad_bias[tokens] = gradient.sum(0, dtype=torch.float32)
    return grad_hidden.to(hidden_dtype), grad_weight, grad_bias
