"""The forward of a fused layer: one C++ call for a step's rows."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast.models.layer_kinds import read_layer
from ppo_fast.models.layer_parts import LayerParts
from ppo_fast.models.transformers_internals import cache_argument
from ppo_fast.ops.backends.cpp_launch import (
    DTYPE_CODES,
    address,
    vouched,
    vouched_or_none,
    written,
)
from ppo_fast.ops.backends.cpus import num_threads
from ppo_fast.ops.gradient import as_dtype
from ppo_fast.ops.quantize_rows import quantize_rows
from ppo_fast.rollout.slots import SlotCache

# Dtypes of a layer's weights, and of what passes from layer to layer.
DTYPES = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
}
# Dtypes that keys and values may be rounded to, by the dtype of what passes from layer to layer.
CACHED = {torch.float32: torch.bfloat16}
# In the order of enum class Activation in csrc/kernels/decode_layer.hpp.
ACTIVATIONS = ("silu", "gelu_tanh")
NORMS = ("attention", "mlp", "attention_out", "mlp_out", "q", "k")


class Rows(NamedTuple):
    """Tensors of a step of n rows that every fused layer reads, checked by the first one.

    layers: size of heads, dtype, and whether they rotate, of the layers that they are checked for.
    of: the cosines and sines as the body gave them to the layers.
    cos, sin: [n, 1, size]; None: the layers do not rotate.
    slots, lengths: [n] int64.
    """

    layers: tuple[int, torch.dtype, bool]
    of: tuple[Tensor, Tensor] | None
    cos: Tensor | None
    sin: Tensor | None
    slots: Tensor
    lengths: Tensor


class StepForward:
    """Forward of a fused layer: the kernel for rows of a SlotCache, else the layer's own.

    Args:
        layer: a layer that qualifies (fused_layers.py).
        window: that of its attention; 0: none.
        int8: whether the kernel reads copies of the matrices in int8, made now; those of a layer in
            float64 stay as they are.

    Attributes:
        layer: see above.
        int8_count: number of its weights in int8.
        calls: number of the kernel's calls.
        why_not: reason why a step last took the layer's own forward; None: none did.
    """

    def __init__(self, layer: Any, window: int, *, int8: bool = False) -> None:
        from ppo_fast.ops import _C

        self.layer, self._cache_argument = layer, cache_argument(layer)
        names = list(inspect.signature(type(layer).forward).parameters)
        # in the arguments after the layer and its input, for bodies that give it by place
        takes_cache = self._cache_argument in names
        self._cache_place = names.index(self._cache_argument) - 2 if takes_cache else -1
        self.calls = 0
        self.why_not: str | None = None
        read = read_layer(layer)
        size, self._rotary = read.head_size, read.rotary
        self._index, self._head_size = read.cache_index, size
        self._keys: Tensor | None = None  # those of the cache that was vouched for last
        self._values: Tensor | None = None
        sizes = _sizes(read)
        self._hidden_size, self._q_size, self._kv_size, self._inner = sizes
        weight = read.weights["q_weight"]
        assert weight is not None
        self._weight_dtype = weight.dtype
        self._dtype = DTYPES[self._weight_dtype]
        self._reads_rows = (size, self._dtype, self._rotary)
        # they must outlive the kernel
        self._matrices = _vouched_matrices(read, sizes, self._weight_dtype)
        int8 = int8 and self._dtype == torch.float32
        inputs_first = read.inputs_first and not int8
        if int8:
            self._matrices = _in_int8(self._matrices, inputs_first=read.inputs_first)
        matrices = [m.weight for m in self._matrices.values() if m.weight is not None]
        self.int8_count = sum(matrix.numel() for matrix in matrices) if int8 else 0
        self._vectors = _vouched_vectors(read, sizes, self._dtype)
        self._kernel = _C.DecodeLayer(
            {name: address(vector) for name, vector in self._vectors.items()}
            | {
                name: (address(weight), 0 if weight is None else weight.stride(0), address(scale))
                for name, (weight, scale) in self._matrices.items()
            }
            | {f"{name}_eps": read.eps.get(f"{name}_eps", 0.0) for name in NORMS}
            | {
                "dtype": DTYPE_CODES[self._dtype],
                "weight_dtype": DTYPE_CODES[matrices[0].dtype],
                "hidden_size": self._hidden_size,
                "num_heads": self._q_size // size,
                "num_kv_heads": self._kv_size // size,
                "head_size": size,
                "intermediate_size": self._inner,
                "inputs_first": inputs_first,
                "layer_norm": read.layer_norm,
                "activation": ACTIVATIONS.index(read.activation),
                "scaling": read.scaling,
                "softcap": read.softcap or 0.0,
                "window": window,
            }
        )

    def __call__(
        self,
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        cache = kwargs.get(self._cache_argument)
        if 0 <= self._cache_place < len(args):
            cache = args[self._cache_place]
        if (
            not isinstance(cache, SlotCache)
            or cache.lengths is None
            or not self._takes(hidden_states, position_embeddings, cache)
        ):
            if hidden_states.dtype == self._dtype:  # its products take the dtype of its weights
                hidden_states = hidden_states.to(self._weight_dtype)
            if self._rotary:
                kwargs["position_embeddings"] = position_embeddings
            return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        rows = cache.vouched
        if rows is None or rows.of is not position_embeddings or rows.layers != self._reads_rows:
            rows = cache.vouched = self._rows(position_embeddings, cache, cache.lengths)
        states = self._step(as_dtype(hidden_states, self._dtype), rows, cache)
        self.calls += 1
        return as_dtype(states, hidden_states.dtype)

    def _takes(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        cache: SlotCache,
    ) -> bool:
        """Return whether a step is in the kernel's dtype, and rotates whole heads."""
        room, dtype = cache.layers[self._index], self._dtype
        stored = cache.dtype or dtype
        rotated = 0 if position_embeddings is None else position_embeddings[0].shape[-1]
        if self._rotary and rotated != self._head_size:
            self.why_not = "it does not rotate whole heads"
            return False
        if torch.is_autocast_enabled("cpu"):
            self.why_not = "the model's forward enters autocast"
        elif hidden_states.dtype not in (dtype, self._weight_dtype):
            weights = self._weight_dtype
            self.why_not = f"its input is {hidden_states.dtype}, its weights are {weights}"
        elif stored not in (dtype, CACHED.get(dtype)):
            self.why_not = f"the cache is {stored}, its states are {dtype}"
        elif room.is_initialized and not room.keys.dtype == room.values.dtype == stored:
            self.why_not = f"keys are {room.keys.dtype}, values {room.values.dtype}, not {stored}"
        else:
            return True
        return False

    def _rows(
        self, position_embeddings: tuple[Tensor, Tensor] | None, cache: SlotCache, lengths: Tensor
    ) -> Rows:
        """Check the tensors of a step that every layer reads."""
        count, size, dtype = len(lengths), self._head_size, self._dtype
        # the cosines and sines of a layer that rotates
        tables = position_embeddings or () if self._rotary else ()
        angles = [
            vouched(name, as_dtype(table, dtype).expand(count, 1, -1), (count, 1, size), dtype)
            for name, table in zip(("cos", "sin"), tables, strict=False)
        ]
        cos, sin = angles or (None, None)
        slots = vouched("slots", cache.row_slots, (count,), torch.int64)
        lengths = vouched("lengths", lengths, (count,), torch.int64)
        return Rows(self._reads_rows, position_embeddings, cos, sin, slots, lengths)

    def _step(self, hidden_states: Tensor, rows: Rows, cache: SlotCache) -> Tensor:
        size, dtype, kv_heads = self._head_size, self._dtype, self._kv_size // self._head_size
        count, room = len(rows.lengths), cache.layers[self._index]
        x = vouched("hidden_states", hidden_states, (count, 1, self._hidden_size), dtype)
        if not room.is_initialized:
            like = x.new_empty(1).expand(count, kv_heads, 1, size)
            room.lazy_initialization(like, like)
        if room.keys is not self._keys or room.values is not self._values:
            cells, stored = (cache.slots, cache.capacity, kv_heads, size), room.keys.dtype
            self._keys = written("keys", room.keys, cells, stored)
            self._values = written("values", room.values, cells, stored)
        y = torch.empty_like(x)
        numbers = count * (2 * self._hidden_size + 2 * (self._q_size + self._kv_size) + self._inner)
        self._kernel(
            x=x.data_ptr(),
            cos=address(rows.cos),
            sin=address(rows.sin),
            cache_dtype=DTYPE_CODES[room.keys.dtype],
            keys=room.keys.data_ptr(),
            values=room.values.data_ptr(),
            capacity=cache.capacity,
            slots=rows.slots.data_ptr(),
            lengths=rows.lengths.data_ptr(),
            y=y.data_ptr(),
            scratch=cache.scratch(numbers, x).data_ptr(),
            num_rows=count,
            num_threads=num_threads(),
        )
        return y


class _Matrix(NamedTuple):
    """A weight as the kernel reads it, with a scale [outputs] if in int8; None: there is none."""

    weight: Tensor | None
    scale: Tensor | None = None


class _Sizes(NamedTuple):
    """Sizes of a layer's states, queries, keys (or values), and of the MLP's inner activations."""

    hidden: int
    queries: int
    keys: int
    inner: int


def _sizes(read: LayerParts) -> _Sizes:
    def of(name: str) -> tuple[int, int]:
        matrix = read.weights[name]
        assert matrix is not None
        outputs, inputs = matrix.shape[::-1] if read.inputs_first else matrix.shape
        return outputs, inputs

    queries, hidden = of("q_weight")
    return _Sizes(hidden, queries, of("k_weight")[0], of("gate_weight")[0])


def _products(sizes: _Sizes) -> dict[str, tuple[int, int]]:
    """Return the outputs and inputs of each product."""
    hidden, queries, keys, inner = sizes
    attention = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden)}
    mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return attention | {"o": (hidden, queries)} | mlp


def _vouched_matrices(read: LayerParts, sizes: _Sizes, dtype: torch.dtype) -> dict[str, _Matrix]:
    matrices: dict[str, _Matrix] = {}
    for name, (outputs, inputs) in _products(sizes).items():
        matrix = read.weights.get(f"{name}_weight")
        if matrix is not None and matrix.stride(1) != 1:
            matrix = matrix.contiguous()
        shape = (inputs, outputs) if read.inputs_first else (outputs, inputs)
        got = None if matrix is None else (tuple(matrix.shape), matrix.dtype, matrix.is_cpu)
        if got not in (None, (shape, dtype, True)):
            raise ValueError(f"{name}_weight: got {got}, expected {dtype} {shape} on cpu")
        matrices[f"{name}_weight"] = _Matrix(matrix)
    return matrices


def _in_int8(matrices: dict[str, _Matrix], *, inputs_first: bool) -> dict[str, _Matrix]:
    """Return copies in int8, [outputs, inputs] however they are stored."""

    def copy(weight: Tensor | None) -> _Matrix:
        if weight is None:
            return _Matrix(None)
        return _Matrix(*quantize_rows(weight.T if inputs_first else weight))

    return {name: copy(matrix.weight) for name, matrix in matrices.items()}


def _vouched_vectors(
    read: LayerParts, sizes: _Sizes, dtype: torch.dtype
) -> dict[str, Tensor | None]:
    shapes = {f"{name}_bias": outputs for name, (outputs, _) in _products(sizes).items()}
    for name in ("attention_norm", "mlp_norm"):
        shapes |= {name: sizes.hidden, f"{name}_bias": sizes.hidden}
    shapes |= {"attention_out_norm": sizes.hidden, "mlp_out_norm": sizes.hidden}
    shapes |= {"q_norm": read.head_size, "k_norm": read.head_size}
    return {
        name: vouched_or_none(name, _to(read.weights.get(name), dtype), (size,), dtype)
        for name, size in shapes.items()
    }


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
