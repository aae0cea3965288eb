"""Transformer layers of the Llama kind, one C++ call per layer and step, on the CPU.

When few rows pass through it, a layer computed op by op spends as long in Python and in waking
threads as in its products. A layer qualifies by its structure, and then by a comparison of logits
with those of the model's own layers (slot_check.py): models that scale a residual, rotate a part of
a head or normalise in a way of their own do not qualify.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.parts import layer_list
from ppo_fast.models.patching import replaced_forwards
from ppo_fast.models.transformers_internals import (
    SLIDING,
    cache_argument,
    layer_types,
    read_llama_layer,
    why_not_llama_like,
)
from ppo_fast.ops.backends.cpp_launch import DTYPE_CODES, address
from ppo_fast.ops.backends.cpus import num_threads
from ppo_fast.rollout.slots import SlotCache
from ppo_fast.rollout.speedups.few_rows import why_no_few_row_products

DTYPES = (torch.float32, torch.float64)


def why_not_fused(layer: nn.Module) -> str | None:
    """Return the reason why ``layer`` cannot be fused, or None if it can.

    Its structure must show the parts of a Llama layer and nothing else that computes.
    """
    if (reason := why_not_llama_like(layer)) is not None:
        return reason
    parameters = list(layer.parameters())
    if len(dtypes := {p.dtype for p in parameters}) > 1 or not dtypes <= set(DTYPES):
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
    with replaced_forwards(forwards):
        yield [forward for _, forward in forwards]


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
        return "the model's body cannot be told from its head"
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

    ``calls`` counts the kernel's calls.
    """

    def __init__(self, layer: Any, window: int) -> None:
        from ppo_fast.ops import _C

        self._layer, self._cache_argument, self.calls = layer, cache_argument(layer), 0
        read = read_llama_layer(layer)
        self._index, size = read.cache_index, read.head_size
        self._q_size, self._kv_size, self._inner = (
            read.weights[name].shape[0] for name in ("q_weight", "k_weight", "gate_weight")
        )
        self._head_size = size
        self._kernel = _C.DecodeLayer(
            {name: address(weight) for name, weight in read.weights.items()}
            | read.eps
            | {
                "dtype": DTYPE_CODES[read.weights["q_weight"].dtype],
                "hidden_size": read.weights["q_weight"].shape[1],
                "num_heads": self._q_size // size,
                "num_kv_heads": self._kv_size // size,
                "head_size": size,
                "intermediate_size": self._inner,
                "scaling": read.scaling,
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
        if not isinstance(cache, SlotCache) or cache.lengths is None:
            own = type(self._layer).forward
            return own(
                self._layer, hidden_states, *args, position_embeddings=position_embeddings, **kwargs
            )
        assert position_embeddings is not None
        self.calls += 1
        lengths, x = cache.lengths, hidden_states.contiguous()
        room = cache.layers[self._index]
        rows, _, hidden_size = x.shape
        if not room.is_initialized:
            like = x.view(rows, 1, 1, hidden_size)[..., : self._head_size]
            like = like.expand(-1, self._kv_size // self._head_size, -1, -1)
            room.lazy_initialization(like, like)
        cos, sin = (t.expand(rows, 1, -1).contiguous() for t in position_embeddings)
        y = torch.empty_like(x)
        self._kernel(
            x=x.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            keys=room.keys.data_ptr(),
            values=room.values.data_ptr(),
            capacity=cache.capacity,
            slots=cache.row_slots.data_ptr(),
            lengths=lengths.data_ptr(),
            y=y.data_ptr(),
            scratch=cache.scratch(
                rows * (hidden_size + 2 * (self._q_size + self._kv_size + self._inner)), x
            ).data_ptr(),
            num_rows=rows,
            num_threads=num_threads(),
        )
        return y
