"""Linear layers on the CPU that compute with copies of their weights in int8.

Decoding few rows takes as long as the weights take to be read: in int8, they are a quarter of
float32's bytes. Activations and sums stay float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.patching import replaced_forwards
from ppo_fast.models.quantized import bits_of, quantized_layers
from ppo_fast.ops.few_row_linear.cpp import few_row_linear
from ppo_fast.ops.quantize_rows import QuantizedRows, quantize_rows
from ppo_fast.ops.validation import HALF
from ppo_fast.rollout.speedups.few_rows import why_no_few_row_products
from ppo_fast.rollout.speedups.step_forward import StepForward


def why_no_int8(model: LanguageModel) -> str | None:
    """Return the reason why no weight of ``model`` can be in int8 for a rollout, or None."""
    if (reason := why_no_few_row_products(model.model)) is not None:
        return reason
    if quantized := quantized_layers(model.model):
        return f"the policy's weights are in {bits_of(quantized[0])} bits already"
    return None


@contextmanager
def int8_products(model: LanguageModel, fused: Sequence[StepForward] = ()) -> Iterator[int]:
    """Within the block, ``nn.Linear`` layers compute with copies of their weights in int8.

    Among them is the LM head. Hooks stay in force. Layers of other classes, in float64, or whose
    forward was replaced, and all layers inside of ``fused`` ones, stay as they are.

    Yields:
        The number of weights in int8, those of ``fused`` layers included.
    """
    inside = {module for forward in fused for module in forward.layer.modules()}
    layers = [m for m in _linear_layers(model.model) if m not in inside]
    copies: dict[nn.Module, QuantizedRows] = {m: quantize_rows(m.weight) for m in layers}
    forwards = [(layer, partial(_forward, _bias(layer), copies[layer])) for layer in layers]
    count = sum(copy.numbers.numel() for copy in copies.values())
    try:
        model.int8_head = None if model.head is None else copies.get(model.head)
        with replaced_forwards(forwards):
            yield count + sum(forward.int8_count for forward in fused)
    finally:
        model.int8_head = None


def _linear_layers(model: nn.Module) -> Iterator[nn.Linear]:
    """Yield the layers that can compute with a weight in int8."""
    for layer in model.modules():
        if type(layer) is not nn.Linear or "forward" in vars(layer):
            continue
        if layer.weight.dtype in (torch.float32, *HALF):
            yield layer


def _bias(layer: nn.Linear) -> Tensor | None:
    return None if layer.bias is None else layer.bias.detach().float()


def _forward(bias: Tensor | None, copy: QuantizedRows, x: Tensor) -> Tensor:
    return few_row_linear(x.float(), copy.numbers, bias, copy.scale).to(x.dtype)
