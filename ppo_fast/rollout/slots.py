"""KV cache with one row (slot) per sequence; rows have lengths of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.precision import autocast_dtype
from ppo_fast.models.transformers_internals import (
    SLIDING,
    Cache,
    DynamicLayer,
    layer_types,
    mask_is_by_type,
)


class SlotCache(Cache):
    """Keys and values of every layer, [slots, capacity, heads, head size].

    Column i of a row is the sequence's token i. Each prompt is computed once and copied to a slot
    for each of its responses (``fill``). Then each step adds one token to the first n rows
    (``begin_step``).

    Args:
        config: the model's text config.
        slots: number of rows.
        capacity: max tokens of a sequence.
        attends: whether steps run within ``step_attention``, which needs no mask.
        dtype: dtype that keys and values are rounded to when they are written; attention reads the
            rounded numbers, those of prompts too. None: the dtype that they come in.
    """

    def __init__(
        self,
        config: Any,
        slots: int,
        capacity: int,
        *,
        attends: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(layers=[_SlotLayer(slots, capacity, dtype) for _ in layer_types(config)])
        self.slots, self.capacity, self.attends, self.dtype = slots, capacity, attends, dtype
        self.lengths: Tensor | None = None  # [n] by row; None while padded prompts are computed
        self.row_slots: Tensor  # [n]
        self.vouched: Any = None  # the step's tensors that fused layers have checked
        self._scratch: Tensor | None = None

    def begin_prompts(self) -> None:
        """Prepare for a pass over prompts [k, P], each of which attends to itself alone."""
        self.lengths = self.vouched = None
        for layer in self.layers:
            layer.cells = None

    def prompts(self) -> list[tuple[Tensor, Tensor]]:
        """Return by layer the keys and values [k, heads, P, size] of the last padded prompts."""
        return [layer.prompts for layer in self.layers]

    def contents(self) -> list[tuple[Tensor, Tensor]]:
        """Return by layer the keys and values [slots, heads, capacity, size]."""
        return [(x.keys.transpose(1, 2), x.values.transpose(1, 2)) for x in self.layers]

    def fill(self, keys_values: list[tuple[Tensor, Tensor]], rows: Tensor, slots: Tensor) -> None:
        """Copy ``rows`` [m] of prompts' keys and values to ``slots`` [m]."""
        for layer, (keys, values) in zip(self.layers, keys_values, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            for room, states in ((layer.keys, keys), (layer.values, values)):
                room[slots, : states.shape[2]] = states.transpose(1, 2)[rows].to(room.dtype)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of slot ``source`` to slot ``target``."""
        for layer in self.layers:
            layer.keys[target, :length] = layer.keys[source, :length]
            layer.values[target, :length] = layer.values[source, :length]

    def begin_step(self, lengths: Tensor, longest: int) -> None:
        """Prepare for a pass that adds a token to each of the first n slots.

        The slots hold ``lengths`` [n] tokens. The pass reads the first ``longest`` columns.
        """
        self.begin_rows(torch.arange(len(lengths), device=lengths.device), lengths)
        cells = self.row_slots * self.capacity + lengths
        seen = lengths + 1 if self.attends else None
        for layer in self.layers:
            layer.cells, layer.longest, layer.seen = cells, longest, seen

    def begin_rows(self, slots: Tensor, lengths: Tensor) -> None:
        """Prepare for a pass of n tokens, one per row.

        Token i goes to slot ``slots[i]``, after ``lengths[i]`` others. Only fused layers
        (fused_layers.py) can compute several tokens of one slot in a pass.
        """
        self.row_slots, self.lengths, self.vouched = slots, lengths, None

    def nbytes(self) -> int:
        """Return the total size of keys and values in bytes."""
        filled = [layer for layer in self.layers if layer.is_initialized]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in filled)

    def scratch(self, count: int, like: Tensor) -> Tensor:
        """Return uninitialised memory for at least ``count`` numbers, valid until the next call."""
        if self._scratch is None or self._scratch.numel() < count:
            self._scratch = like.new_empty(count)
        return self._scratch


class _SlotLayer(DynamicLayer):
    """Keys and values of one layer."""

    def __init__(self, slots: int, capacity: int, stored_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.slots, self.capacity, self.stored_dtype = slots, capacity, stored_dtype
        self.cells: Tensor | None = None  # [n], indices in [slots * capacity] of a step's tokens
        self.longest = 0
        self.seen: Tensor | None = None  # [n], how many of a row's tokens its query sees
        self.prompts: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def room(states: Tensor) -> Tensor:
            # zeros: attention multiplies unwritten columns by a weight of 0, and 0 * NaN is NaN
            shape = self.slots, self.capacity, states.shape[1], states.shape[3]
            return states.new_zeros(shape, dtype=self.stored_dtype)

        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take the keys and values of new tokens, and return all that these attend to.

        The new ones are [n, heads, tokens, size]. What is returned has their dtype; under autocast
        its own, in which attention would compute: rotated keys are in float32, and values are not.
        """
        if (dtype := autocast_dtype(key_states.device.type)) is not None:
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.cells is None:
            keys, values = (self._rounded(states) for states in (key_states, value_states))
            self.prompts = keys, values
            return keys.to(key_states.dtype), values.to(value_states.dtype)
        read = len(self.cells), self.longest
        keys = self._written(self.keys, key_states, *read)
        keys.lengths = self.seen  # type: ignore[attr-defined]  # read by step_attention.py
        return keys, self._written(self.values, value_states, *read)

    def _written(self, room: Tensor, states: Tensor, rows: int, longest: int) -> Tensor:
        assert self.cells is not None
        room.view(-1, *room.shape[2:]).index_copy_(0, self.cells, states[:, :, 0].to(room.dtype))
        return room[:rows, :longest].transpose(1, 2).to(states.dtype)

    def _rounded(self, states: Tensor) -> Tensor:
        return states if self.stored_dtype is None else states.to(self.stored_dtype)

    def get_seq_length(self) -> int:
        return 0 if self.cells is None else self.longest - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.cells is None else self.longest), 0


def step_arguments(
    model: LanguageModel, cache: SlotCache, tokens: Tensor, lengths: Tensor, columns: int
) -> dict[str, Any]:
    """Return the arguments of ``LanguageModel.next`` for one more token in n slots.

    ``tokens`` [n] are the tokens of the first n slots, which hold ``lengths`` [n] tokens before
    them, each less than ``columns``.
    """
    cache.begin_step(lengths, columns)
    return {
        "input_ids": tokens[:, None],
        "position_ids": lengths[:, None],
        "attention_mask": _no_mask(model)
        if cache.attends
        else step_mask(model.text_config, lengths, columns, model.dtype),
        "cache": cache,
    }


def _no_mask(model: LanguageModel) -> Any:
    """Return a mask of four dimensions that nothing reads: given it, the model makes no other."""
    nothing = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=model.device)
    return _by_type(model.text_config, lambda kind: nothing)


def step_mask(config: Any, lengths: Tensor, longest: int, dtype: torch.dtype) -> Any:
    """Return a step's attention mask [n, 1, 1, longest].

    It is 0 where a token attends, else the dtype's lowest number; a dict by type of attention where
    the model mixes several.
    """
    distance = lengths[:, None] - torch.arange(longest, device=lengths.device)

    def mask(kind: str) -> Tensor:
        seen = distance >= 0
        if kind == SLIDING:
            seen = seen & (distance < config.sliding_window)
        zeros = torch.zeros(seen.shape, dtype=dtype, device=lengths.device)
        return zeros.masked_fill_(~seen, torch.finfo(dtype).min)[:, None, None]

    return _by_type(config, mask)


def _by_type(config: Any, mask: Callable[[str], Tensor]) -> Any:
    """Return ``mask`` as the model takes it: a dict by type of attention where it mixes several."""
    masks = {kind: mask(kind) for kind in set(layer_types(config))}
    return masks if mask_is_by_type(config) else next(iter(masks.values()))
