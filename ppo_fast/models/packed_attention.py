"""Attention of packed tokens: each sequence attends to itself, in a row without padding.

transformers looks up a model's attention by name in its AttentionInterface at every call. Within
a ``PackedPass``, a model takes the one of this module: on a GPU in half precision torch's attention
of rows of different lengths, on the CPU a call a block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from ppo_fast.data.tokens import Tokens
from ppo_fast.models.precision import HALF, autocast_dtype
from ppo_fast.models.transformers_internals import ATTENTION_EXTRAS, attention_set_to
from ppo_fast.models.varlen_attention import RowEnds, varlen_attention
from ppo_fast.ops.gradient import as_dtype, computed_in, without_autocast

NAME = "ppo_fast_packed"

# The pass of this thread; autograd has threads of its own, in which a pass may be computed again.
_here = threading.local()


# (pass, query, key, value, scaling, window (0: none)) -> attention
Way = Callable[["PackedPass", Tensor, Tensor, Tensor, "float | None", int], Tensor]


class PackedPass:
    """A pass over packed tokens, for its attention.

    Args:
        tokens: its tokens.
        config: the model's config, in which its attention is named.

    Attributes:
        used: attention modules that have computed it.
    """

    def __init__(self, tokens: Tokens, config: Any) -> None:
        self.tokens, self.config = tokens, config
        self.used: set[nn.Module] = set()
        self._masks: dict[tuple[int, int, int], Tensor] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the block, the model's attention is that of this pass."""
        before = current()
        _here.packed_pass = self
        try:
            with attention_set_to(NAME, self.config):
                yield
        finally:
            _here.packed_pass = before

    @cached_property
    def keys(self) -> Tensor | None:
        """Index [M] of the keys of each block in turn, its prefix's first; None: its own alone."""
        blocks = self.tokens.packing.blocks
        if not any(block.prefix for block in blocks):
            return None
        spans = [span for b in blocks for span in ((b.prefix,) if b.prefix else ()) + (b[:2],)]
        index = torch.cat([torch.arange(*span, device="cpu") for span in spans])
        return index.to(self.tokens.device)

    @cached_property
    def lengths(self) -> list[int]:
        """Number of tokens of each block."""
        return [block.end - block.start for block in self.tokens.packing.blocks]

    @cached_property
    def prefixes(self) -> list[int | None]:
        """Index of the block that is each block's prefix; None: it has none, or an empty one."""
        blocks = self.tokens.packing.blocks
        index = {(block.start, block.end): i for i, block in enumerate(blocks)}
        return [None if block.prefix is None else index.get(block.prefix) for block in blocks]

    @cached_property
    def row_ends(self) -> tuple[RowEnds, RowEnds]:
        """Where the queries and the keys of each block end, made once for all layers."""
        queries, device = self.lengths, self.tokens.device
        before = [0 if prefix is None else queries[prefix] for prefix in self.prefixes]
        keys = [n + m for n, m in zip(queries, before, strict=True)]
        return RowEnds.of(queries, device), RowEnds.of(keys, device)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column [N] of each packed token, on the device."""
        packing, device = self.tokens.packing, self.tokens.device
        return packing.rows.to(device), packing.columns.to(device)

    def mask(self, queries: int, keys: int, window: int) -> Tensor:
        """Return [queries, keys] bool, which keys each of the last ``queries`` tokens attends to.

        They are itself and those before it; of these the last ``window`` alone, if it is not 0.
        """
        if (queries, keys, window) not in self._masks:
            at = torch.arange(keys - queries, keys, device=self.tokens.device)[:, None]
            key = torch.arange(keys, device=self.tokens.device)
            mask = (key <= at) & (key > at - window) if window else key <= at
            self._masks[queries, keys, window] = mask
        return self._masks[queries, keys, window]


def current() -> PackedPass | None:
    """Return the packed pass that is running in this thread, or None."""
    return getattr(_here, "packed_pass", None)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return contexts of a checkpointed part of a model, and of computing it again.

    For ``context_fn`` of torch.utils.checkpoint: what is computed again attends as it did.
    """
    now = current()
    return nullcontext(), nullcontext() if now is None else now.running()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention: query [1, H, N, d], key and value [1, K, N, d] -> [1, N, H, d].

    The arguments are those of transformers' AttentionInterface.
    """
    packed_pass = current()
    assert packed_pass is not None
    if unknown := [name for name in ATTENTION_EXTRAS if options.get(name) is not None]:
        raise NotImplementedError(f"packed attention has no {unknown[0]}")
    if options.get("dropout"):
        raise NotImplementedError("packed attention has no dropout; call model.eval()")
    if attention_mask is not None:
        raise NotImplementedError("packed attention takes no mask, and the model makes one")
    packed_pass.used.add(module)
    window = options.get("sliding_window") or 0
    dtype, computed = _dtypes(query)
    with without_autocast(query.device):
        query, key, value = (as_dtype(x, computed) for x in (query, key, value))
        out = _way(query)(packed_pass, query, key, value, scaling, window)
    return as_dtype(out, dtype), None


def _dtypes(query: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtype of this attention's output, and the one in which it is computed.

    Under autocast, queries and keys are often in float32, since rotating them made them so; as
    autocast would, half precision is chosen for them. On a CPU that is computed in float32:
    PyTorch's backward pass is slower in bfloat16.
    """
    dtype = autocast_dtype(query.device.type) or query.dtype
    return dtype, dtype if query.is_cuda else computed_in(dtype)


def _way(query: Tensor) -> Way:
    """Return how the attention of these queries is computed."""
    if not query.is_cuda:
        return by_blocks
    takes = query.dtype in HALF and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    return varlen if takes and varlen_attention() is not None else padded


def by_blocks(
    packed_pass: PackedPass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int,
) -> Tensor:
    """Compute attention [1, N, H, d] in one call a block."""
    outs = []
    # a slice's gradient is as large as what it is taken from; those of a split are put together
    queries, keys, values = (x.split(packed_pass.lengths, dim=2) for x in (query, key, value))
    for q, k, v, prefix in zip(queries, keys, values, packed_pass.prefixes, strict=True):
        if prefix is not None:
            k = torch.cat([keys[prefix], k], dim=2)
            v = torch.cat([values[prefix], v], dim=2)
        masked = prefix is not None or 0 < window < k.shape[2]
        mask = packed_pass.mask(q.shape[2], k.shape[2], window) if masked else None
        outs.append(_sdpa(q, k, v, mask, scaling))
    return torch.cat(outs, dim=2).transpose(1, 2)


def varlen(
    packed_pass: PackedPass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int,
) -> Tensor:
    """Compute attention [1, N, H, d] in one call on rows of different lengths."""
    attend = varlen_attention()
    assert attend is not None
    if (index := packed_pass.keys) is not None:
        key, value = key[:, :, index], value[:, :, index]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(q, k, v, *packed_pass.row_ends, scaling, window)[None]


def padded(
    packed_pass: PackedPass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int,
) -> Tensor:
    """Compute attention [1, N, H, d] of padded sequences in one call."""
    index = packed_pass.tokens.packed_index
    q, k, v = (x[0][:, index].transpose(0, 1) for x in (query, key, value))  # [B, H, L, d]
    length = index.shape[1]
    mask = packed_pass.mask(length, length, window) if 0 < window < length else None
    out = _sdpa(q, k, v, mask, scaling)
    rows, columns = packed_pass.places
    return out[rows, :, columns][None]


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )


# It has no entry in AttentionMaskInterface, so that transformers makes no mask: before, it would
# look for packed sequences in the position ids, and wait for a GPU.
AttentionInterface.register(NAME, _attention)
