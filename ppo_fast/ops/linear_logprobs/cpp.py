"""``linear_logprobs`` on the CPU, a tile of the vocabulary at a time.

The BLAS computes the products; the kernels of csrc/kernels/linear_logprobs.hpp do the rest.

Where the processor multiplies bfloat16 numbers, logits of operands in bfloat16 are computed from
these, with float32 sums (few_row_linear), and the gradient of the logits is rounded to bfloat16 for
its products, as under autocast. Elsewhere each slice of the weight is converted to float32.

A tile is the logits [n, columns] of all n rows that count. Going over the vocabulary, not over the
tokens, reads each slice of the weight once a product and writes each slice of its gradient once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppo_fast.ops.backends.cpp_launch import DTYPE_CODES, address, empty, vouched, vouched_or_none
from ppo_fast.ops.backends.cpus import num_threads

# A tile that stays in the last-level cache between the product that writes it and the kernel that
# reads it, and enough columns for the BLAS to reach its speed.
_TILE_BYTES, _MIN_COLUMNS = 2**23, 256


class _Head(NamedTuple):
    """An LM head, and how its products become logits."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    scale: float
    softcap: float  # 0: none
    temperature: float
    work: torch.dtype  # of logits and of all arithmetic
    bfloat16: bool  # whether products are of bfloat16 numbers, which all operands hold

    def logits(self, hidden: Tensor, first: int, out: Tensor) -> None:
        """Compute W h of a tile into ``out`` [n, columns], from hidden [n, D] in ``work``."""
        columns = out.shape[1]
        if not self.bfloat16:
            torch.mm(hidden, self.rows(first, columns).T, out=out)
            return
        from ppo_fast.ops import _C

        _C.few_row_linear(
            dtype=DTYPE_CODES[self.work],
            weight_dtype=DTYPE_CODES[self.weight.dtype],
            x=address(hidden),
            weight=address(self.weight[first:]),
            bias=0,
            scales=0,
            y=address(out),
            num_rows=len(hidden),
            num_inputs=hidden.shape[1],
            num_outputs=columns,
            weight_stride=self.weight.stride(0),
            num_threads=num_threads(),
        )

    def rows(self, first: int, columns: int) -> Tensor:
        """Return the weight of a tile, [columns, D]."""
        return self.weight[first : first + columns].to(self.work)

    def add_product(self, gradient: Tensor, first: int, to: Tensor) -> None:
        """Add gradient [n, columns] times the weight of a tile to ``to`` [n, D] in ``work``."""
        if self.bfloat16:
            to += gradient @ self.weight[first : first + gradient.shape[1]]
        else:
            to.addmm_(gradient, self.rows(first, gradient.shape[1]))

    def describe(self, first: int, logits: Tensor) -> dict[str, Any]:
        """Return the kernels' arguments for the tile that starts at token ``first``."""
        num_rows, width = logits.shape
        return {
            "dtype": DTYPE_CODES[self.work],
            "num_rows": num_rows,
            "width": width,
            "first_token": first,
            "bias": 0 if self.bias is None else address(self.bias[first:]),
            "scale": self.scale,
            "softcap": self.softcap,
            "temperature": self.temperature,
            "num_threads": num_threads(),
        }


class _Tiles:
    """The tiles of n rows.

    The first tiles, as many as ``kept`` [K] has room for, stay there for the backward; the others
    share one scratch tile.
    """

    def __init__(self, head: _Head, num_rows: int, kept: Tensor) -> None:
        self.vocab_size, hidden_size = head.weight.shape
        self.num_rows, self.kept = num_rows, kept
        # A slice of the weight that must be converted takes room as well.
        converted = hidden_size if head.weight.dtype != head.work and not head.bfloat16 else 1
        columns = _TILE_BYTES // (max(num_rows, converted) * head.work.itemsize)
        self.columns = min(max(columns, _MIN_COLUMNS), self.vocab_size)
        self._scratch: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[int, int, Tensor | None]]:
        """Yield first token, columns, and place in ``kept`` (None: not kept) of each tile."""
        for first in range(0, self.vocab_size, self.columns):
            columns = min(self.columns, self.vocab_size - first)
            start, end = self.num_rows * first, self.num_rows * (first + columns)
            fits = end <= self.kept.numel()
            place = self.kept[start:end].view(self.num_rows, columns) if fits else None
            yield first, columns, place

    def scratch(self, num_rows: int, columns: int) -> Tensor:
        """Return [num_rows, columns] to write in; the next call returns the same memory."""
        if self._scratch is None:
            self._scratch = empty((self.num_rows * self.columns,), self.kept.dtype)
        return self._scratch[: num_rows * columns].view(num_rows, columns)


@torch.no_grad()
@torch.autocast("cpu", enabled=False)  # autocast would compute products in half precision
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
    """Compute log-probs, entropies, and the statistics and kept tiles that backward needs.

    Log-probs are [N], entropies [N] (an empty tensor without ``with_entropy``), statistics [N, 2];
    the kept tiles take at most ``budget_bytes``.
    """
    from ppo_fast.ops import _C

    head = _vouched_head(hidden, weight, bias, logit_scale, softcap, temperature)
    rows, hidden, labels = _counting_rows(hidden, labels, mask, head.work)
    num_rows, n, vocab_size = len(labels) if mask is None else len(mask), len(labels), len(weight)
    kept = _zeros_untouched(min(num_rows * vocab_size, budget_bytes // head.work.itemsize), head)
    start = torch.tensor([-torch.inf, 0, 0, torch.nan], dtype=torch.float64, device="cpu")
    state = start.repeat(n, 1)
    tiles = _Tiles(head, n, kept)
    for first, columns, place in tiles:
        logits = tiles.scratch(n, columns) if place is None else place
        head.logits(hidden, first, logits)
        _C.fold_tile(
            **head.describe(first, logits),
            logits=address(logits),
            labels=address(labels),
            with_entropy=with_entropy,
            state=address(state),
        )
    logprobs, stats = empty((n,), head.work), empty((n, 2), head.work)
    entropy = empty((n if with_entropy else 0,), head.work)
    _C.finish_rows(
        dtype=DTYPE_CODES[head.work],
        num_rows=n,
        state=address(state),
        temperature=temperature,
        logprobs=address(logprobs),
        entropy=address(entropy) if with_entropy else 0,
        stats=address(stats),
    )
    if with_entropy:
        entropy = _spread(entropy, rows, num_rows)
    return _spread(logprobs, rows, num_rows), entropy, _spread(stats, rows, num_rows), kept


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
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
    """Compute the gradients of hidden, weight and bias, in their dtypes.

    A gradient that ``needs_grad`` does not ask for is an empty tensor.
    """
    head = _vouched_head(hidden, weight, bias, logit_scale, softcap, temperature)
    num_rows = len(hidden)
    a = vouched_or_none("grad_logprobs", grad_logprobs, (num_rows,), head.work)
    b = vouched_or_none("grad_entropy", grad_entropy, (num_rows,), head.work)
    stats = vouched("stats", stats, (num_rows, 2), head.work)
    entropies = None if b is None else vouched("entropy", entropy, (num_rows,), head.work)
    kept = vouched("kept", kept, (kept.numel(),), head.work)
    rows, h, y = _counting_rows(hidden, labels, mask, head.work)
    tiles = _Tiles(head, len(h), kept)
    # For each row of the products, its row in the kept tiles.
    source = _nonzero_rows(_take(a, rows), _take(b, rows)) if drop_zero_rows else None
    if source is not None:
        h, y = h[source], y[source]
        rows = source if rows is None else rows[source]
    of_rows = _RowValues(
        y,
        stats if rows is None else stats[rows],
        _take(entropies, rows),
        _take(a, rows),
        _take(b, rows),
    )
    grad_h = torch.zeros_like(h) if needs_grad[0] else None
    h_used = h.bfloat16() if head.bfloat16 else h
    grad_weight = empty(tuple(weight.shape) if needs_grad[1] else (0,), weight.dtype)
    like_bias = weight if bias is None else bias
    grad_bias = empty((len(weight) if needs_grad[2] else 0,), like_bias.dtype)
    for first, columns, place in tiles:
        gradient = _tile_gradient(head, tiles, first, columns, place, source, h, of_rows)
        if needs_grad[2]:
            grad_bias[first : first + columns] = gradient.sum(0)
        if head.bfloat16:
            gradient = gradient.bfloat16()
        if grad_h is not None:
            head.add_product(gradient, first, grad_h)
        if needs_grad[1]:
            _write(grad_weight[first : first + columns], gradient, h_used)
    if grad_h is None:
        return hidden.new_empty(0), grad_weight, grad_bias
    return _spread(grad_h.to(hidden.dtype), rows, num_rows), grad_weight, grad_bias


class _RowValues(NamedTuple):
    """Values of each row of the products: TileGradientArgs in csrc/kernels/linear_logprobs.hpp."""

    labels: Tensor
    stats: Tensor
    entropy: Tensor | None
    grad_logprobs: Tensor | None
    grad_entropy: Tensor | None


def _tile_gradient(
    head: _Head,
    tiles: _Tiles,
    first: int,
    columns: int,
    place: Tensor | None,
    source: Tensor | None,
    hidden: Tensor,
    values: _RowValues,
) -> Tensor:
    """Compute dL/d(W h) of a tile in the scratch tile: another backward may read a kept tile."""
    from ppo_fast.ops import _C

    gradient = tiles.scratch(len(hidden), columns)
    if place is None:
        head.logits(hidden, first, gradient)
    _C.tile_gradient(
        **head.describe(first, gradient),
        logits=address(gradient if place is None else place),
        shaped=place is not None,
        source=0 if place is None else address(source),
        labels=address(values.labels),
        stats=address(values.stats),
        entropy=address(values.entropy),
        grad_logprobs=address(values.grad_logprobs),
        grad_entropy=address(values.grad_entropy),
        gradient=address(gradient),
    )
    return gradient


def _vouched_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> _Head:
    vocab_size, hidden_size = weight.shape
    double = torch.float64 in (hidden.dtype, weight.dtype)
    work = torch.float64 if double else torch.float32
    vouched("hidden", hidden[:0], (0, hidden_size), hidden.dtype)
    vouched("weight", weight[:0], (0, hidden_size), weight.dtype)
    if bias is not None:
        bias = vouched("bias", bias.to(work), (vocab_size,), work)
    half = hidden.dtype == weight.dtype == torch.bfloat16 and weight.stride(1) == 1
    numbers = (logit_scale, softcap or 0.0, temperature)
    return _Head(weight, bias, *numbers, work, half and multiplies_bfloat16())


def multiplies_bfloat16() -> bool:
    """Return whether the kernels in use multiply bfloat16 numbers without converting them."""
    from ppo_fast.ops import _C

    return _C.instruction_set() == "avx512_bf16"


def _counting_rows(
    hidden: Tensor, labels: Tensor, mask: Tensor | None, work: torch.dtype
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the indices of unmasked rows (None: all), and their hidden states and labels."""
    num_rows = len(hidden)
    labels = vouched("labels", labels, (num_rows,), torch.int64)
    mask = vouched_or_none("mask", mask, (num_rows,), torch.bool)
    rows = None if mask is None or mask.all() else mask.nonzero()[:, 0]
    if rows is not None:
        hidden, labels = hidden[rows], labels[rows]
    return rows, hidden.to(work).contiguous(), labels


def _zeros_untouched(count: int, head: _Head) -> Tensor:
    """Return zeros that take no memory until they are written.

    So the part of the budget that masked rows leave unused costs nothing.
    """
    return torch.from_numpy(
        np.zeros(count, np.float64 if head.work == torch.float64 else np.float32)
    )


def _nonzero_rows(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return the rows where a or b is not 0; None if these are all rows."""
    parts = [x != 0 for x in (a, b) if x is not None]
    counts = parts[0] if len(parts) == 1 else parts[0] | parts[1]
    return None if counts.all() else counts.nonzero()[:, 0]


def _take(values: Tensor | None, rows: Tensor | None) -> Tensor | None:
    if values is None or rows is None:
        return values
    return values[rows]


def _spread(values: Tensor, rows: Tensor | None, num_rows: int) -> Tensor:
    """Return [num_rows, ...] with ``values`` at ``rows`` (None: all) and 0 elsewhere."""
    if rows is None:
        return values
    return values.new_zeros(num_rows, *values.shape[1:]).index_copy_(0, rows, values)


def _write(place: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Write gradient^T @ hidden to ``place``, rounded to its dtype once."""
    if place.dtype == gradient.dtype:
        torch.mm(gradient.T, hidden, out=place)
    else:
        place.copy_(gradient.T @ hidden)
