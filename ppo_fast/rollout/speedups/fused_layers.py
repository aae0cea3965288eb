"""Transformer layers of several kinds, one C++ call per layer and step, on the CPU.

When few rows pass through it, a layer computed op by op spends as long in Python and in waking
threads as in its products. A layer qualifies by its structure (models/layer_kinds.py), and then by
a comparison of logits with those of the model's own layers (slot_check.py): models that scale a
residual, rotate a part of a head or normalise in a way of their own do not qualify.

Weights may be in bfloat16. What a product multiplies them with is then rounded to bfloat16, as
under autocast in the update; sums, what passes from layer to layer, keys and values are float32.
Keys and values alone are rounded to bfloat16 in a SlotCache of that dtype.
Or copies of the weights in int8 are multiplied with what is float32 (int8_products.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.layer_kinds import why_no_kind
from ppo_fast.models.parts import layer_list
from ppo_fast.models.patching import replaced_forwards
from ppo_fast.models.transformers_internals import SLIDING, layer_types
from ppo_fast.rollout.speedups.few_rows import why_no_few_row_products
from ppo_fast.rollout.speedups.step_forward import DTYPES, StepForward


def why_not_fused(layer: nn.Module) -> str | None:
    """Return the reason why ``layer`` cannot be fused, or None if it can.

    Its structure must show the parts of a layer of a known kind and nothing else that computes.
    """
    if (reason := why_no_kind(layer)) is not None:
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
def fused_layers(model: LanguageModel, *, int8: bool = False) -> Iterator[list[StepForward]]:
    """Within the block, compute rows of a SlotCache by one C++ call per qualifying layer.

    Hooks on a layer stay in force. Yields the forwards of these layers; under autocast there are
    none. With ``int8``, they read copies of the layers' matrices in int8.
    """
    candidates = [] if why_no_layer_is_fused(model) else _layers(model)
    forwards = [
        (layer, StepForward(layer, window, int8=int8))
        for layer, window in candidates
        if why_not_fused(layer) is None
    ]
    # where every layer is fused: others take the dtype of their weights
    outside = _float32_outside(model) if len(forwards) == len(candidates) else []
    with replaced_forwards([*forwards, *outside]):
        yield [forward for _, forward in forwards]


def _float32_outside(model: LanguageModel) -> list[tuple[nn.Module, Any]]:
    """Return the embedding and the last norm of a model in bfloat16, with forwards in float32.

    Then all that passes from layer to layer is float32, and so are the rotary tables, as under
    autocast. RMS norms of transformers take float32 as they are.
    """
    if not model.fused or model.dtype != torch.bfloat16:
        return []
    embedding = model.model.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(embedding, nn.Embedding) or "forward" in vars(embedding):
        return []
    inside = {module for layer in layer_list(model.body) for module in layer.modules()}
    norms = [
        module
        for module in model.model.modules()
        if type(module) is nn.LayerNorm and module not in inside and "forward" not in vars(module)
    ]
    own = type(embedding).forward
    return [
        (embedding, lambda ids: own(embedding, ids).float()),
        *((norm, partial(_float32_norm, norm)) for norm in norms),
    ]


def _float32_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    weight, bias = (None if p is None else p.float() for p in (norm.weight, norm.bias))
    return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)


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
