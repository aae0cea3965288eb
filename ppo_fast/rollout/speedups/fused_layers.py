"""Transformer layers of the Llama kind, one C++ call per layer and step, on the CPU.

When few rows pass through it, a layer computed op by op spends as long in Python and in waking
threads as in its products. A layer qualifies by its structure, and then by a comparison of logits
with those of the model's own layers (slot_check.py): models that scale a residual, rotate a part of
a head or normalise in a way of their own do not qualify.

Weights may be in bfloat16. What a product multiplies them with is then rounded to bfloat16, as
under autocast in the update; sums, what passes from layer to layer, keys and values are float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.llama_layers import read_llama_layer, why_not_llama_like
from ppo_fast.models.parts import layer_list
from ppo_fast.models.patching import replaced_forwards
from ppo_fast.models.transformers_internals import (
    SLIDING,
    cache_argument,
    layer_types,
)
from ppo_fast.ops.backends.cpp_launch import (
    DTYPE_CODES,
    address,
    vouched,
    vouched_or_none,
    written,
)
from ppo_fast.ops.backends.cpus import num_threads
from ppo_fast.rollout.slots import SlotCache
from ppo_fast.rollout.speedups.few_rows import why_no_few_row_products

# Dtypes of a layer's weights, and of what passes from layer to layer.
DTYPES = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
}


def why_not_fused(layer: nn.Module) -> str | None:
    """Return the reason why ``layer`` cannot be fused, or None if it can.

    Its structure must show the parts of a Llama layer and nothing else that computes.
    """
    if (reason := why_not_llama_like(layer)) is not None:
        return reason
    parameters = list(layer.parameters())
    if len(dtypes := {p.dtype for p in parameters}) > 1 or not dtypes <= DTYPES.keys():
        return f"its weights are {', '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))}"
    if not all(p.is_cpu and p.is_contiguous() for p in parameters):
        return "its weights are not contiguous on the CPU"
    for name, module in layer.named_modules():
        if "forward" in vars(module) or (name and _is_hooked(module)):
            return f"its {name or 'forward'} was changed or has hooks"
    return None


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


@contextmanager
def fused_layers(model: LanguageModel) -> Iterator[list[StepForward]]:
    """Within the block, compute rows of a SlotCache by one C++ call per qualifying layer.

    Hooks on a layer stay in force. Yields the forwards of these layers; under autocast there are
    none.
    """
    candidates = [] if why_no_layer_is_fused(model) else _layers(model)
    forwards = [
        (layer, StepForward(layer, window))
        for layer, window in candidates
        if why_not_fused(layer) is None
    ]
    embedding = _float32_embedding(model) if len(forwards) == len(candidates) else []
    with replaced_forwards([*forwards, *embedding]):
        yield [forward for _, forward in forwards]


def _float32_embedding(model: LanguageModel) -> list[tuple[nn.Module, Any]]:
    """Return the embedding of a model in bfloat16, and a forward of it that returns float32.

    Then all that passes from layer to layer is float32, and so are the rotary tables, as under
    autocast. Only where every layer is fused: others take the dtype of their weights.
    """
    if not model.fused or model.dtype != torch.bfloat16:
        return []
    embedding = model.model.get_input_embeddings()  # type: ignore[operator]
    if type(embedding) is not nn.Embedding or "forward" in vars(embedding):
        return []
    return [(embedding, lambda ids: nn.Embedding.forward(embedding, ids).float())]


def why_not_all_are_fused(model: LanguageModel) -> str | None:
    """Return the reason why some or all layers of ``model`` cannot be fused, or None."""
    if (reason := why_no_layer_is_fused(model)) is not None:
        return reason
    reasons = [why_not_fused(layer) for layer, _ in _layers(model)]
    return next((f"layer {i}: {reason}" for i, reason in enumerate(reasons) if reason), None)


def why_no_layer_is_fused(model: LanguageModel) -> str | None:
    """Return the reason why no layer of ``model`` can be fused, or None if some may be."""
    if (reason := why_no_few_row_products(model.model)) is not None:
        return reason
    if model.body is None:
        return "the model does not give access to its layers apart from the LM head"
    try:
        layer_list(model.body)
    except ValueError:  # a body of another shape decodes as it is
        return f"{type(model.body).__name__} has no list of its layers"
    return None


def _layers(model: LanguageModel) -> list[tuple[nn.Module, int]]:
    """Return each layer with the window of its attention (0: none)."""
    kinds = layer_types(model.text_config)
    windows = [model.text_config.sliding_window if kind == SLIDING else 0 for kind in kinds]
    return list(zip(layer_list(model.body), windows, strict=True))


class StepForward:
    """Forward of a fused layer: the kernel for rows of a SlotCache, else the layer's own.

    Attributes:
        calls: number of the kernel's calls.
        why_not: reason why a step last took the layer's own forward; None: none did.
    """

    def __init__(self, layer: Any, window: int) -> None:
        from ppo_fast.ops import _C

        self._layer, self._cache_argument = layer, cache_argument(layer)
        self.calls = 0
        self.why_not: str | None = None
        read = read_llama_layer(layer)
        size = read.head_size
        self._index, self._head_size = read.cache_index, size
        self._weight_dtype = read.weights["q_weight"].dtype
        self._dtype = DTYPES[self._weight_dtype]
        self._q_size, self._kv_size, self._inner = (
            read.weights[name].shape[0] for name in ("q_weight", "k_weight", "gate_weight")
        )
        self._hidden_size = read.weights["q_weight"].shape[1]
        self._weights = self._vouched_weights(read.weights)  # they must outlive the kernel
        self._kernel = _C.DecodeLayer(
            {name: address(weight) for name, weight in self._weights.items()}
            | read.eps
            | {
                "dtype": DTYPE_CODES[self._dtype],
                "weight_dtype": DTYPE_CODES[self._weight_dtype],
                "hidden_size": self._hidden_size,
                "num_heads": self._q_size // size,
                "num_kv_heads": self._kv_size // size,
                "head_size": size,
                "intermediate_size": self._inner,
                "scaling": read.scaling,
                "window": window,
            }
        )

    def _vouched_weights(self, weights: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        hidden, inner, q, kv = self._hidden_size, self._inner, self._q_size, self._kv_size
        products = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
        products |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        matrices: dict[str, tuple[int, ...]] = {f"{x}_weight": s for x, s in products.items()}
        vectors: dict[str, tuple[int, ...]] = {f"{x}_bias": s[:1] for x, s in products.items()}
        vectors |= {"attention_norm": (hidden,), "mlp_norm": (hidden,)}
        vectors |= {"q_norm": (self._head_size,), "k_norm": (self._head_size,)}
        return {
            name: vouched_or_none(name, weights[name], shape, self._weight_dtype)
            for name, shape in matrices.items()
        } | {
            name: vouched_or_none(name, _to(weights[name], self._dtype), shape, self._dtype)
            for name, shape in vectors.items()
        }

    def __call__(
        self,
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        cache = kwargs.get(self._cache_argument)
        if (
            not isinstance(cache, SlotCache)
            or cache.lengths is None
            or not self._takes(hidden_states, position_embeddings, cache)
        ):
            if hidden_states.dtype == self._dtype:  # its products take the dtype of its weights
                hidden_states = hidden_states.to(self._weight_dtype)
            own = type(self._layer).forward
            return own(
                self._layer, hidden_states, *args, position_embeddings=position_embeddings, **kwargs
            )
        assert position_embeddings is not None
        dtype, of_input = self._dtype, hidden_states.dtype
        cos, sin = (table.to(dtype) for table in position_embeddings)
        states = self._step(hidden_states.to(dtype), (cos, sin), cache, cache.lengths)
        self.calls += 1
        return states.to(of_input)

    def _takes(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        cache: SlotCache,
    ) -> bool:
        """Return whether a step is in the kernel's dtype, and rotates whole heads."""
        room, dtype = cache.layers[self._index], self._dtype
        if position_embeddings is None or position_embeddings[0].shape[-1] != self._head_size:
            self.why_not = "it does not rotate whole heads"
            return False
        if torch.is_autocast_enabled("cpu"):
            self.why_not = "the model's forward enters autocast"
        elif hidden_states.dtype not in (dtype, self._weight_dtype):
            weights = self._weight_dtype
            self.why_not = f"its input is {hidden_states.dtype}, its weights are {weights}"
        elif room.is_initialized and not room.keys.dtype == room.values.dtype == dtype:
            self.why_not = f"keys are {room.keys.dtype}, values {room.values.dtype}, not {dtype}"
        else:
            return True
        return False

    def _step(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        cache: SlotCache,
        lengths: Tensor,
    ) -> Tensor:
        size, dtype, kv_heads = self._head_size, self._dtype, self._kv_size // self._head_size
        rows, room = len(hidden_states), cache.layers[self._index]
        x = vouched("hidden_states", hidden_states, (rows, 1, self._hidden_size), dtype)
        if not room.is_initialized:
            like = x.view(rows, 1, 1, -1)[..., :size].expand(-1, kv_heads, -1, -1)
            room.lazy_initialization(like, like)
        cells = (cache.slots, cache.capacity, kv_heads, size)
        cos, sin = (
            vouched(name, table.expand(rows, 1, -1), (rows, 1, size), dtype)
            for name, table in zip(("cos", "sin"), position_embeddings, strict=True)
        )
        slots = vouched("slots", cache.row_slots, (rows,), torch.int64)
        lengths = vouched("lengths", lengths, (rows,), torch.int64)
        y = torch.empty_like(x)
        count = rows * (self._hidden_size + 2 * (self._q_size + self._kv_size) + self._inner)
        self._kernel(
            x=x.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            keys=written("keys", room.keys, cells, dtype).data_ptr(),
            values=written("values", room.values, cells, dtype).data_ptr(),
            capacity=cache.capacity,
            slots=slots.data_ptr(),
            lengths=lengths.data_ptr(),
            y=y.data_ptr(),
            scratch=cache.scratch(count, x).data_ptr(),
            num_rows=rows,
            num_threads=num_threads(),
        )
        return y


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
