"""The KV cache of sequences that come and go: a row (slot) each, at lengths of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.transformers_internals import (
    SLIDING,
    Cache,
    DynamicLayer,
    layer_types,
    mask_is_by_type,
)


class SlotCache(Cache):
    """Keys and values of every layer, [slots, capacity, heads, head size], column i of a row being
    the sequence's token i. A prompt is computed for itself and copied to a slot for each of
    its responses (``place``); then each step adds one token to the first n rows (``begin_step``).

    Args:
        config: the model's text config.
        slots: rows.
        capacity: the most tokens of a sequence.
        attends: steps run within ``step_attention``, which needs no mask.
    """

    def __init__(self, config: Any, slots: int, capacity: int, *, attends: bool = False) -> None:
        super().__init__(layers=[_SlotLayer(slots, capacity) for _ in layer_types(config)])
        self.slots, self.capacity, self.attends = slots, capacity, attends
        self.lengths: Tensor | None = None  # [n] by row; None while padded prompts are computed
        self.row_slots: Tensor  # [n]
        self._scratch: Tensor | None = None

    def begin_prompts(self) -> None:
        """The next pass computes prompts [k, P], which see themselves alone."""
        self.lengths = None
        for layer in self.layers:
            layer.cells = None

    def prompts(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [k, heads, P, size] of the padded prompts just computed, by layer."""
        return [layer.prompts for layer in self.layers]

    def contents(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [slots, heads, capacity, size] by layer."""
        return [(x.keys.transpose(1, 2), x.values.transpose(1, 2)) for x in self.layers]

    def place(self, keys_values: list[tuple[Tensor, Tensor]], rows: Tensor, slots: Tensor) -> None:
        """Copy ``rows`` [m] of prompts' keys and values to ``slots`` [m]."""
        for layer, (keys, values) in zip(self.layers, keys_values, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            layer.keys[slots, : keys.shape[2]] = keys.transpose(1, 2)[rows]
            layer.values[slots, : values.shape[2]] = values.transpose(1, 2)[rows]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of a slot to another."""
        for layer in self.layers:
            layer.keys[target, :length] = layer.keys[source, :length]
            layer.values[target, :length] = layer.values[source, :length]

    def begin_step(self, lengths: Tensor, longest: int) -> None:
        """The next pass adds a token to each of the first n slots, which hold ``lengths`` [n]
        tokens, and reads the first ``longest`` columns."""
        self.begin_rows(torch.arange(len(lengths), device=lengths.device), lengths)
        cells = self.row_slots * self.capacity + lengths
        seen = lengths + 1 if self.attends else None
        for layer in self.layers:
            layer.cells, layer.longest, layer.seen = cells, longest, seen

    def begin_rows(self, slots: Tensor, lengths: Tensor) -> None:
        """The next pass takes n tokens, one a row: of ``slots`` [n], each after ``lengths`` [n]
        others. Only fused layers (fused_layers.py) can do so when a slot has several."""
        self.row_slots, self.lengths = slots, lengths

    def nbytes(self) -> int:
        """Of all keys and values."""
        filled = [layer for layer in self.layers if layer.is_initialized]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in filled)

    def scratch(self, count: int, like: Tensor) -> Tensor:
        """Room for ``count`` numbers until somebody asks again."""
        if self._scratch is None or self._scratch.numel() < count:
            self._scratch = like.new_empty(count)
        return self._scratch


class _SlotLayer(DynamicLayer):
    """One layer's keys and values."""

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__()
        self.slots, self.capacity = slots, capacity
        self.cells: Tensor | None = None  # [n], where a step's tokens go in [slots * capacity]
        self.longest = 0
        self.seen: Tensor | None = None  # [n], of a row's tokens those that its query sees
        self.prompts: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def room(states: Tensor) -> Tensor:
            # zeros: what no token has written is multiplied by a weight of 0, and may not be NaN
            return states.new_zeros(self.slots, self.capacity, states.shape[1], states.shape[3])

        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes the new tokens' [n, heads, tokens, size]; returns all that they may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.cells is None:
            self.prompts = key_states, value_states
            return self.prompts
        read = len(self.cells), self.longest
        keys = self._written(self.keys, key_states, *read)
        keys.lengths = self.seen  # type: ignore[attr-defined]  # read by step_attention.py
        return keys, self._written(self.values, value_states, *read)

    def _written(self, room: Tensor, states: Tensor, rows: int, longest: int) -> Tensor:
        assert self.cells is not None
        room.view(-1, *room.shape[2:]).index_copy_(0, self.cells, states[:, :, 0])
        return room[:rows, :longest].transpose(1, 2)

    def get_seq_length(self) -> int:
        return 0 if self.cells is None else self.longest - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.cells is None else self.longest), 0


def step_arguments(
    model: LanguageModel, cache: SlotCache, tokens: Tensor, lengths: Tensor, columns: int
) -> dict[str, Any]:
    """What ``LanguageModel.next`` is called with for one more token each: ``tokens`` [n] for the
    first n slots, which hold ``lengths`` [n] before it, each less than ``columns``."""
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
    """One of four dimensions, in place of which the model makes none; nothing reads it."""
    nothing = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=model.device)
    return _by_type(model.text_config, lambda kind: nothing)


def step_mask(config: Any, lengths: Tensor, longest: int, dtype: torch.dtype) -> Any:
    """What a step's tokens may look at, as the model takes it: [n, 1, 1, longest], 0 or the lowest
    number, by type of attention where the model mixes several."""
    distance = lengths[:, None] - torch.arange(longest, device=lengths.device)

    def mask(kind: str) -> Tensor:
        seen = distance >= 0
        if kind == SLIDING:
            seen = seen & (distance < config.sliding_window)
        zeros = torch.zeros(seen.shape, dtype=dtype, device=lengths.device)
        return zeros.masked_fill_(~seen, torch.finfo(dtype).min)[:, None, None]

    return _by_type(config, mask)


def _by_type(config: Any, mask: Callable[[str], Tensor]) -> Any:
    """As the model takes masks: by type of attention where it mixes several."""
    masks = {kind: mask(kind) for kind in set(layer_types(config))}
    return masks if mask_is_by_type(config) else next(iter(masks.values()))
