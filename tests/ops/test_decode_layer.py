"""The C++ kernel of a decoding step's layers, against the layers' own forward in float64."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.transformers_internals import Conv1D
from ppo_fast.ops import _C, quantize_rows
from ppo_fast.ops.backends import cpus
from ppo_fast.rollout.slots import SlotCache, _SlotLayer, step_arguments
from ppo_fast.rollout.speedups.few_rows import few_row_products
from ppo_fast.rollout.speedups.fused_layers import fused_layers
from ppo_fast.rollout.speedups.int8_products import int8_products


def qwen3(**changes):
    """Return a Qwen 3 model, which normalises each head's queries and keys."""
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 24}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 131, "vocab_size": 307} | changes
    return with_other_norms(AutoConfig.for_model("qwen3", initializer_range=0.15, **sizes))


def llama(**changes):
    """Return a Llama with biases, and norm weights other than 1, so that errors show."""
    config = tiny_config("llama", layers=3)
    config.update({"attention_bias": True, "mlp_bias": True} | changes)
    return with_other_norms(config)


def gpt2(**changes):
    """Return a GPT-2 whose biases and norms are not 0 and 1."""
    config = tiny_config("gpt2", layers=3)
    config.update({"n_inner": 131} | changes)
    return with_other_norms(config)


def gemma(family, **changes):
    """Return a Gemma whose norms are not 1; Gemma 2 and 3 have four norms and windows."""
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 24}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 131, "vocab_size": 307}
    sizes |= {} if family == "gemma" else {"sliding_window": 6, "query_pre_attn_scalar": 20}
    if family == "gemma3_text":
        sizes["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    config = AutoConfig.for_model(family, initializer_range=0.15, **sizes | changes)
    return with_other_norms(config)


def with_other_norms(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name or "ln_" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def with_exact_norms(model):
    """Make the norms compute in the weights' dtype; transformers' own compute in float32."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            plain = hasattr(module, "variance_epsilon")
            eps = module.variance_epsilon if plain else module.eps
            weight = module.weight if plain else 1.0 + module.weight
            module.forward = lambda x, eps=eps, weight=weight: F.rms_norm(
                x, x.shape[-1:], weight, eps
            )
    return model


def with_int8_weights(model):
    """Round matrices to what they are in int8, with a scale for each output."""
    for layer in model.model.layers if hasattr(model, "model") else model.transformer.h:
        for module in layer.modules():
            weight = getattr(module, "weight", None)
            if weight is None or weight.dim() < 2:
                continue
            rows = weight.T if isinstance(module, Conv1D) else weight
            numbers, scale = quantize_rows(rows.float(), impl="reference")
            rows.data.copy_(numbers.double() * scale.double()[:, None])
    return model


# Each kind of layer; None: windows as the model's own config says.
MODELS = [
    *((make, window) for make in (llama, qwen3) for window in (0, 6)),
    (lambda: llama(num_key_value_heads=4), 0),
    (lambda: llama(num_key_value_heads=4), 6),
    (gpt2, None),
    (lambda: gpt2(scale_attn_by_inverse_layer_idx=True, n_inner=None), None),
    (lambda: gemma("gemma"), None),
    (lambda: gemma("gemma2", attn_logit_softcapping=1.5, final_logit_softcapping=None), None),
    (lambda: gemma("gemma3_text"), None),
]
NAMES = ["llama", "llama-window", "qwen3", "qwen3-window", "llama-heads", "llama-heads-window"]
NAMES += ["gpt2", "gpt2-inverse", "gemma", "gemma2", "gemma3"]
each_model = pytest.mark.parametrize(("make", "window"), MODELS, ids=NAMES)


def filled_cache(model, slots=5, capacity=40, stored=None):
    """Return a SlotCache with 1, 8, 15, ... tokens of random keys and values per slot."""
    config, dtype = model.text_config, model.dtype
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = SlotCache(config, slots, capacity, dtype=stored)
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    states = torch.randn(slots, heads, capacity, size, dtype=dtype)
    prompts = [(states.roll(i), states.roll(-i)) for i in range(config.num_hidden_layers)]
    for layer, pair in zip(cache.layers, prompts, strict=True):
        layer.lazy_initialization(*pair)
    cache.fill(prompts, torch.arange(slots), torch.arange(slots))
    return cache, torch.arange(slots) * 7 + 1


def three_models(make, window, dtype, wide):
    """Return a model with weights in ``dtype``, and the same numbers in ``wide`` and in float64.

    For torch.int8 the first has weights in float32, and the others these rounded to int8's.
    """
    int8 = dtype == torch.int8
    stored = torch.float32 if int8 else dtype
    rounded = with_int8_weights if int8 else lambda model: model
    model = LanguageModel(make().to(stored))
    own_model = LanguageModel(rounded(make().to(stored)).to(wide))
    exact = LanguageModel(with_exact_norms(rounded(make().to(stored).double())))
    for lm in (model, own_model, exact):
        if window:
            lm.text_config.layer_types = ["sliding_attention"] * 3
            lm.text_config.sliding_window = window
            lm.model.model.has_sliding_layers = True
    return model, own_model, exact


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
@each_model
@pytest.mark.parametrize("isa", _C.instruction_sets())
@torch.no_grad()
def test_fused_layers_equal_the_models_own(make, window, dtype, isa):
    """States, keys and values of rows at different positions have at most twice eager's error.

    Eager computes with weights in bfloat16 as the update does: in float32, under autocast. With
    weights in int8, the truth and eager have them rounded.
    """
    int8 = dtype == torch.int8
    wide = torch.float32 if dtype in (torch.bfloat16, torch.int8) else dtype
    model, own_model, exact = three_models(make, window, dtype, wide)
    torch.manual_seed(1)
    cache, lengths = filled_cache(model)
    tokens = torch.tensor([3, 300, 41, 41, 7])
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]

    def step(lm, patched):
        of_states = torch.float64 if lm is exact else wide
        of_values = torch.bfloat16 if torch.is_autocast_enabled("cpu") else of_states
        of_keys = of_values if lm.text_config.model_type == "gpt2" else of_states  # not rotated
        for layer, (keys, values) in zip(cache.layers, before, strict=True):
            layer.keys, layer.values = keys.to(of_keys).clone(), values.to(of_values).clone()
        cache._scratch = None
        arguments = step_arguments(lm, cache, tokens, lengths, int(lengths.max()) + 1)
        if patched:
            with fused_layers(lm, int8=int8) as layers:
                states = lm.next(**arguments).states
            assert [layer.calls for layer in layers] == [1, 1, 1]
        else:
            states = lm.next(**arguments).states
        return [states, *(x for layer in cache.layers for x in (layer.keys, layer.values))]

    default = _C.instruction_set()
    _C.use_instruction_set(isa)
    try:
        found = step(model, patched=True)
    finally:
        _C.use_instruction_set(default)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        eager = step(own_model, patched=False)
    truth = step(exact, patched=False)
    for got, own, expected in zip(found, eager, truth, strict=True):
        assert got.dtype == wide
        scale = expected.abs().max()
        budget = 2 * (own.double() - expected).abs().max() + 8 * torch.finfo(wide).eps * scale
        assert (got.double() - expected).abs().max() <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@each_model
@pytest.mark.parametrize("isa", _C.instruction_sets())
@torch.no_grad()
def test_a_cache_in_bfloat16(monkeypatch, make, window, dtype, isa):
    """States from keys and values in bfloat16 have at most twice the error of eager in float32.

    All read the cache that the kernel wrote, whose new entries are those of float64, rounded.
    """
    model, own_model, exact = three_models(make, window, dtype, torch.float32)
    torch.manual_seed(1)
    cache, lengths = filled_cache(model, stored=torch.bfloat16)
    assert {x.dtype for layer in cache.layers for x in (layer.keys, layer.values)} == {
        torch.bfloat16
    }
    tokens = torch.tensor([3, 300, 41, 41, 7])

    def step(lm):
        cache._scratch = None
        return lm.next(**step_arguments(lm, cache, tokens, lengths, int(lengths.max()) + 1)).states

    default = _C.instruction_set()
    _C.use_instruction_set(isa)
    try:
        with fused_layers(model, int8=dtype == torch.int8) as layers:
            found = step(model)
        assert [layer.calls for layer in layers] == [1, 1, 1]
    finally:
        _C.use_instruction_set(default)
    new = []

    def read(self, room, states, rows, longest):
        written = room.view(-1, *room.shape[2:])[self.cells]
        new.append((written.double(), states[:, :, 0].double()))
        return room[:rows, :longest].transpose(1, 2).to(states.dtype)

    monkeypatch.setattr(_SlotLayer, "_written", read)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        eager = step(own_model)
    of_eager, of_truth = new, []
    new = of_truth
    truth = step(exact)
    budget = 2 * (eager.double() - truth).abs().max() + 8 * 2**-23 * truth.abs().max()
    assert (found.double() - truth).abs().max() <= budget
    for (written, own), (_, expected) in zip(of_eager, of_truth, strict=True):
        budget = 2 * (own - expected).abs().max() + 8 * 2**-23 * expected.abs().max()
        assert ((written - expected).abs() <= 2**-8 * expected.abs() + budget).all()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    "make",
    # work for several threads
    [
        lambda: llama(intermediate_size=2048),
        lambda: gpt2(n_inner=2048),
        lambda: gemma("gemma2", intermediate_size=2048),
    ],
    ids=["llama", "gpt2", "gemma2"],
)
@pytest.mark.parametrize("isa", _C.instruction_sets())
@torch.no_grad()
def test_a_rows_bits_depend_on_the_row_alone(monkeypatch, make, dtype, stored, isa):
    """The bits do not depend on the other rows or on the number of threads."""
    monkeypatch.setattr(cpus, "usable_cpus", lambda: 7)
    int8 = dtype == torch.int8
    model = LanguageModel(make().to(torch.float32 if int8 else dtype))
    tokens = torch.tensor([3, 300, 41, 41, 7])

    def step(rows, threads):
        torch.manual_seed(1)
        cache, lengths = filled_cache(model, stored=stored)
        kept = [(layer.keys[rows], layer.values[rows]) for layer in cache.layers]
        for layer, (keys, values) in zip(cache.layers, kept, strict=True):
            layer.keys, layer.values = keys, values
        default = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with (
                fused_layers(model, int8=int8) as fused,
                int8_products(model, fused) if int8 else nullcontext(),
                few_row_products(model.model),
            ):
                assert len(fused) == 3
                cache.slots = len(rows)
                arguments = step_arguments(model, cache, tokens[rows], lengths[rows], 30)
                return model.next(**arguments).logits
        finally:
            torch.set_num_threads(default)

    default = _C.instruction_set()
    _C.use_instruction_set(isa)
    try:
        expected = step([0, 1, 2, 3, 4], 2)
        for rows in ([0], [3], [4, 0], [2, 1, 3], [4, 3, 2, 1, 0]):
            for threads in (1, 2, 7):
                assert torch.equal(step(rows, threads), expected[rows])
    finally:
        _C.use_instruction_set(default)
