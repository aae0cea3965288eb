"""Launchers of C++ kernels, given wrong tensors: an error, and never a read or write elsewhere."""

from __future__ import annotations

import contextlib
import importlib

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from triton_cases import CASES, Example

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.rollout.slots import SlotCache
from ppo_fast.rollout.speedups.fused_layers import fused_layers

NAMES = [name for name in CASES if not name.startswith("decode_attention")]
OTHER = {torch.float32: torch.float64, torch.float64: torch.float32, torch.bfloat16: torch.float32}
OTHER |= {torch.int64: torch.int32, torch.bool: torch.uint8}
ERRORS = (ValueError, TypeError, RuntimeError)
# Those of linear_logprobs: another weight is another vocabulary, and any number of tiles is kept.
ANY_LENGTH = {"linear_logprobs_forward": {1}, "linear_logprobs_backward": {1, 8}}


def call_of(name):
    folder, _, function = CASES[name].launcher.partition("/")
    launcher = getattr(importlib.import_module(f"ppo_fast.ops.{folder}.cpp"), function)
    return launcher, CASES[name].arguments(Example(6, 40, torch.float32, True))


def numbers(result):
    """The float outputs, in one tensor."""
    results = (result,) if isinstance(result, Tensor) else result
    return torch.cat([x.double().flatten() for x in results if x.is_floating_point()])


def tensors(arguments):
    return [i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.numel() > 1]


def changed(name, index, change):
    launcher, arguments = call_of(name)
    given = list(arguments)
    given[index] = change(given[index])
    return launcher, given


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", ["device", "length"])
def test_another_device_or_length(name, change):
    """An error, or the same numbers: what an option leaves out is not read."""
    launcher, arguments = call_of(name)
    expected = numbers(launcher(*arguments))
    function = CASES[name].launcher.partition("/")[2]
    for index in tensors(arguments):
        if change == "length" and index in ANY_LENGTH.get(function, ()):
            continue
        launcher, given = changed(
            name, index, lambda x: x[:-1] if change == "length" else x.to("meta")
        )
        try:
            found = numbers(launcher(*given))
        except (*ERRORS, NotImplementedError):
            continue
        assert found.device.type == "cpu"
        assert torch.equal(found, expected), f"argument {index} was read"


@pytest.mark.parametrize("name", NAMES)
def test_another_dtype(name):
    """An error, or what the same values give: some launchers convert."""
    launcher, arguments = call_of(name)
    expected = numbers(launcher(*arguments))
    for index in tensors(arguments):
        launcher, given = changed(name, index, lambda x: x.to(OTHER[x.dtype]))
        try:
            found = numbers(launcher(*given))
        except ERRORS:
            continue
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_another_layout(name):
    """Strides are read, or a contiguous copy is made."""
    launcher, arguments = call_of(name)
    expected = numbers(launcher(*arguments))
    for index in tensors(arguments):

        def spread(x):
            return torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0]

        launcher, given = changed(name, index, spread)
        assert not given[index].is_contiguous()
        found = numbers(launcher(*given))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def step_of(layer, cache, **changes):
    states = changes.get("states", torch.randn(2, 1, 64))
    tables = changes.get("tables", (torch.randn(1, 1, 16), torch.randn(1, 1, 16)))
    return layer(states, position_embeddings=tables, **{layer._cache_argument: cache})


def filled(model, dtype=torch.float32):
    cache = SlotCache(model.text_config, 3, 8)
    keys = torch.randn(2, 2, 4, 16)
    pairs = [(keys, keys.to(dtype)) for _ in cache.layers]
    rows = torch.arange(2)
    cache.fill(pairs, rows, rows)
    cache.begin_rows(rows, torch.tensor([4, 4]))
    return cache


@pytest.mark.parametrize("what", ["slots", "lengths", "keys", "sizes"])
def test_a_layer_checks_what_it_hands_over(what):
    model = LanguageModel(tiny_model("llama"))
    with fused_layers(model) as layers:
        step_of(layers[0], filled(model))
        cache = filled(model)
        if what == "slots":
            cache.row_slots = cache.row_slots.int()
        elif what == "lengths":
            cache.lengths = cache.lengths[:1]
        elif what == "keys":
            cache.layers[0].keys = cache.layers[0].keys.transpose(0, 1)
        else:
            cache.layers[0].values = cache.layers[0].values[:, :, :, :8]
        with pytest.raises(ValueError, match="expected"):
            step_of(layers[0], cache)
        assert layers[0].calls == 1


def test_values_of_another_dtype_take_the_layers_own_forward():
    """A model whose forward enters autocast has keys in float32 and values in bfloat16."""
    model = LanguageModel(tiny_model("llama"))
    with fused_layers(model) as layers:
        cache = filled(model, torch.bfloat16)
        assert cache.layers[0].values.dtype == torch.bfloat16
        with contextlib.suppress(RuntimeError):  # what attention says of such a cache
            step_of(layers[0], cache)
        assert layers[0].calls == 0
        assert (
            layers[0].why_not == "keys are torch.float32, values torch.bfloat16, not torch.float32"
        )


def test_tables_for_a_part_of_a_head_take_the_layers_own_forward():
    model = LanguageModel(tiny_model("llama"))
    with fused_layers(model) as layers:
        tables = (torch.randn(1, 1, 8), torch.randn(1, 1, 8))
        with pytest.raises(RuntimeError, match="size of tensor"):  # of a Llama layer
            step_of(layers[0], filled(model), tables=tables)
        assert layers[0].calls == 0
        assert layers[0].why_not == "it does not rotate whole heads"
