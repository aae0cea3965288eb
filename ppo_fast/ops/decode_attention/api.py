"""``decode_attention``: validation and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.ops.backends import library
from ppo_fast.ops.backends.dispatch import choose
from ppo_fast.ops.backends.impls import Impl
from ppo_fast.ops.decode_attention import reference
from ppo_fast.ops.validation import (
    check_floating,
    check_int64,
    check_number,
    check_same_device,
    values_readable,
)

# The Triton kernel keeps a block of keys and values in shared memory.
LARGEST_HEAD = 256


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    window: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Compute a decoding step's attention: one query a row, over keys and values of a cache.

    Vaswani et al. 2017 (arXiv 1706.03762), eq. 1, with the grouped heads of Ainslie et al. 2023
    (arXiv 2305.13245): query head h reads head h // (H / K) of keys and values. Row i sees the
    columns j before lengths[i], with ``window`` only the last ``window`` of them::

        p_j = exp(scaling * q . k_j) / sum_l exp(scaling * q . k_l)
        result = sum_j p_j v_j

    The other columns have no effect, and may hold NaN. The Triton kernel does not read them: a
    row's time depends on its own length, not on L. Sums are in float32 (float64 for float64); for
    bfloat16 and float16 the Triton kernel rounds exp(...) to that dtype before the product with the
    values, as tensor cores take it. With the Triton kernel a row's bits depend on the row alone,
    not on the other rows nor on L.

    Legend: n sequences, L columns of the cache, H query heads, K heads of keys and values, d the
    size of a head.

    Args:
        query: [n, H, d], float32, float64, bfloat16 or float16; H is a multiple of K.
        keys: [n, L, K, d] of the same dtype. The last dimension is contiguous, the others have any
            strides: a slice ``cache[:n, :L]`` of a cache [slots, capacity, K, d] is not copied.
        values: [n, L, K, d], likewise.
        lengths: [n] int64, how many columns each row sees, 1 to L. A row of length 0 gives zeros.
        scaling: multiplies q . k, usually d ** -0.5.
        window: how many of its last columns a row sees; None: all of them.
        impl: see ppo_fast.ops.backends.dispatch. "auto" takes the reference for heads of more than
        256.

    Returns:
        [n, H, d] in the dtype of the query.

    Raises:
        TypeError: tensors that are not floating point, or of different dtypes; lengths not int64.
        ValueError: shapes, strides or devices that do not fit; a number out of its range; a length
            outside 0 to L (lengths are checked on CPU tensors only: on CUDA that would wait for
            the device, and a longer one counts as L there); an input that requires grad where
            autograd is on, for the op has no gradient.
        RuntimeError, NotImplementedError: ``impl`` cannot run here; see ops/backends/dispatch.py.
    """
    _check_tensors(query, keys, values, lengths)
    check_number("decode_attention", "scaling", scaling)
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}, expected 1 or more, or None for no window")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, keys, values)):
        raise ValueError(
            "decode_attention has no gradient, and an input requires grad: call it under "
            "torch.no_grad(), or use scaled_dot_product_attention to train"
        )
    chosen = choose("decode_attention", impl, query.device, query.dtype).impl
    if chosen == "triton" and query.shape[2] > LARGEST_HEAD:
        if impl != "auto":
            raise NotImplementedError(
                f"impl={chosen!r}: heads of {query.shape[2]}, expected {LARGEST_HEAD} at most; "
                "use impl='reference'"
            )
        chosen = "reference"
    if chosen == "reference":
        return reference.decode_attention(query, keys, values, lengths, scaling, window)
    run = library.decode_attention[chosen]
    return run(query, keys, values, lengths, float(scaling), window)


def _check_tensors(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
    check_floating("query", query)
    if query.ndim != 3 or 0 in query.shape[1:]:
        raise ValueError(f"query: got shape {tuple(query.shape)}, expected [n, H, d]")
    num_rows, num_heads, head_size = query.shape
    if keys.ndim != 4 or keys.shape[0] != num_rows or keys.shape[3] != head_size:
        raise ValueError(
            f"keys: got shape {tuple(keys.shape)}, expected [{num_rows}, L, K, {head_size}] "
            f"to fit query {tuple(query.shape)}; slice the cache to the rows that decode"
        )
    if keys.shape[2] == 0 or num_heads % keys.shape[2]:
        raise ValueError(
            f"keys: got {keys.shape[2]} heads, expected a number that divides the {num_heads} "
            "of query"
        )
    if values.shape != keys.shape:
        raise ValueError(
            f"values: got shape {tuple(values.shape)}, expected {tuple(keys.shape)}, that of keys"
        )
    for name, x in (("keys", keys), ("values", values)):
        if x.dtype != query.dtype:
            raise TypeError(f"{name}: got {x.dtype}, expected {query.dtype}, the dtype of query")
        check_same_device(name, x, query.device)
        if x.stride(3) != 1 and head_size > 1:
            raise ValueError(
                f"{name}: got strides {x.stride()}, expected 1 in the last dimension; "
                "make it contiguous once, not at every step"
            )
    check_int64("lengths", lengths, query.shape[:1], query.device)
    if values_readable(lengths):
        wrong = (lengths < 0) | (lengths > keys.shape[1])
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"lengths: got {int(lengths[row])} in row {row}, expected 0 to {keys.shape[1]}, "
                "the columns of keys"
            )
