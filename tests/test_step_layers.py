"""What a rollout changes in a model for its duration: faster layers with the same numbers, and
nothing left behind."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from tiny_models import FAMILIES, PAD_ID, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from ppo_fast import _C
from ppo_fast.language_model import LanguageModel
from ppo_fast.models import disable_dropout
from ppo_fast.rollout import Sampling, decode
from ppo_fast.rollout.checks import layers_can_be_fused
from ppo_fast.rollout.few_rows import few_row_products
from ppo_fast.rollout.layers import fused_layers
from ppo_fast.rollout.slots import SlotCache, step_arguments

FUSED = {"llama": 3, "qwen2": 3, "gpt2": 0, "gemma2": 0, "gpt_neox": 0, "cohere": 0}


def qwen3(**changes):
    """It norms each head's queries and keys."""
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 24}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 131, "vocab_size": 307} | changes
    config = AutoConfig.for_model("qwen3", initializer_range=0.15, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def llama(**changes):
    """With weights that a mistake would show in: biases, norms other than 1."""
    config = tiny_config("llama", layers=3)
    config.update({"attention_bias": True, "mlp_bias": True} | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def with_exact_norms(model):
    """Theirs compute in float32 whatever the weights are."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            eps, weight = module.variance_epsilon, module.weight
            module.forward = lambda x, eps=eps, weight=weight: F.rms_norm(
                x, x.shape[-1:], weight, eps
            )
    return model


def state_of(model):
    """Everything that a patch could leave behind."""
    return [
        (name, dict(vars(module)), module.training, list(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


def filled_cache(model, slots=5, capacity=40):
    """Slots that hold 1, 8, 15, ... tokens of random keys and values."""
    config, dtype = model.text_config, model.dtype
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = SlotCache(config, slots, capacity)
    states = torch.randn(slots, config.num_key_value_heads, capacity, size, dtype=dtype)
    prompts = [(states.roll(i), states.roll(-i)) for i in range(config.num_hidden_layers)]
    for layer, pair in zip(cache.layers, prompts, strict=True):
        layer.lazy_initialization(*pair)
    cache.place(prompts, torch.arange(slots), torch.arange(slots))
    return cache, torch.arange(slots) * 7 + 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("make", [llama, qwen3, lambda: llama(num_key_value_heads=4)])
@pytest.mark.parametrize("isa", _C.instruction_sets())
@torch.no_grad()
def test_fused_layers_are_the_models_own(make, window, dtype, isa):
    """States, keys and values, rows at different places; float32 within twice eager's error."""
    model = LanguageModel(make().to(dtype))
    exact = LanguageModel(with_exact_norms(make().double()))
    for lm in (model, exact):
        if window:
            lm.text_config.layer_types = ["sliding_attention"] * 3
            lm.text_config.sliding_window = window
            lm.model.model.has_sliding_layers = True
    torch.manual_seed(1)
    cache, lengths = filled_cache(model)
    tokens = torch.tensor([3, 300, 41, 41, 7])
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]

    def step(lm, patched):
        for layer, (keys, values) in zip(cache.layers, before, strict=True):
            layer.keys, layer.values = keys.to(lm.dtype).clone(), values.to(lm.dtype).clone()
        cache._scratch = None
        arguments = step_arguments(lm, cache, tokens, lengths, int(lengths.max()))
        if patched:
            with fused_layers(lm) as count:
                states = lm.next(**arguments).states
            assert count == 3
        else:
            states = lm.next(**arguments).states
        return [states, *(x for layer in cache.layers for x in (layer.keys, layer.values))]

    default = _C.instruction_set()
    _C.use_instruction_set(isa)
    try:
        found = step(model, patched=True)
    finally:
        _C.use_instruction_set(default)
    eager, truth = step(model, patched=False), step(exact, patched=False)
    for got, own, expected in zip(found, eager, truth, strict=True):
        scale = expected.abs().max()
        budget = 2 * (own.double() - expected).abs().max() + 8 * torch.finfo(dtype).eps * scale
        assert (got.double() - expected).abs().max() <= budget


@torch.no_grad()
def test_a_rows_bits_depend_on_the_row_alone():
    """Not on which rows come with it, or on the number of threads."""
    model = LanguageModel(llama())
    tokens = torch.tensor([3, 300, 41, 41, 7])

    def step(rows, threads):
        torch.manual_seed(1)
        cache, lengths = filled_cache(model)
        kept = [(layer.keys[rows], layer.values[rows]) for layer in cache.layers]
        for layer, (keys, values) in zip(cache.layers, kept, strict=True):
            layer.keys, layer.values = keys, values
        default = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with few_row_products(model.model), fused_layers(model):
                cache.slots = len(rows)
                arguments = step_arguments(model, cache, tokens[rows], lengths[rows], 29)
                return model.next(**arguments).logits
        finally:
            torch.set_num_threads(default)

    expected = step([0, 1, 2, 3, 4], 2)
    for rows in ([0], [3], [4, 0], [2, 1, 3], [4, 3, 2, 1, 0]):
        for threads in (1, 2, 7):
            assert torch.equal(step(rows, threads), expected[rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_which_layers_are_fused(family):
    model = LanguageModel(tiny_model(family, layers=3))
    with fused_layers(model) as count:
        assert count == FUSED[family]
    assert layers_can_be_fused(model) == (count > 0)


def test_a_layer_with_more_than_meets_the_eye_is_not_fused():
    """Granite scales its residuals; nothing in its structure says so."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 131, "vocab_size": 307}
    config = AutoConfig.for_model("granite", residual_multiplier=0.5, **sizes)
    model = LanguageModel(AutoModelForCausalLM.from_config(config).eval())
    with fused_layers(model) as count:
        assert count == 2, "by its structure it could be"
    assert not layers_can_be_fused(model)


@pytest.mark.parametrize("what", ["hook", "forward", "half", "bias of a norm"])
def test_what_somebody_changed_is_left_alone(what):
    raw = tiny_model("llama")
    layer = raw.model.layers[0]
    if what == "hook":
        layer.mlp.register_forward_hook(lambda *_: None)
    if what == "forward":
        own = layer.self_attn.q_proj.forward
        layer.self_attn.q_proj.forward = lambda x: 2 * own(x)
    if what == "half":
        raw.bfloat16()
    if what == "bias of a norm":
        layer.input_layernorm.bias = torch.nn.Parameter(torch.zeros(64))
    with fused_layers(LanguageModel(raw)) as count:
        assert count == (0 if what == "half" else 1)


def test_nothing_is_fused_under_autocast():
    model = LanguageModel(tiny_model("llama"))
    with torch.autocast("cpu", dtype=torch.bfloat16), fused_layers(model) as count:
        assert count == 0
        with few_row_products(model.model):
            assert "forward" not in vars(model.model.lm_head)


class Raised(BaseException):
    """As KeyboardInterrupt is: no Exception."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("error", [None, ValueError, Raised])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_it_was_after_a_rollout(family, error, training):
    raw = tiny_model(family, layers=3)
    disable_dropout(raw.train(training))
    model = LanguageModel(raw, num_layers_unfrozen=1)
    calls = []

    def fail(*_):
        calls.append(1)
        if error is not None and len(calls) > 12:
            raise error

    raw.get_input_embeddings().register_forward_hook(fail)
    before = state_of(raw)
    weights = {name: p.clone() for name, p in raw.state_dict().items()}
    arguments = {"seeds": torch.arange(2), "eos_ids": [], "pad_id": PAD_ID}
    if error is None:
        decode(model, [[5, 6, 7], [8]], Sampling(20), **arguments)
    else:
        with pytest.raises(error):
            decode(model, [[5, 6, 7], [8]], Sampling(20), **arguments)
    assert state_of(raw) == before
    assert all(torch.equal(p, weights[name]) for name, p in raw.state_dict().items())


def test_a_model_without_keys_and_values_is_refused():
    config = AutoConfig.for_model(
        "qwen3_next", num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=307
    )
    model = tiny_model("llama")
    model.config.layer_types = list(config.layer_types)
    with pytest.raises(ValueError, match="policy_model: its layers of type linear_attention"):
        decode(
            LanguageModel(model), [[3]], Sampling(2), seeds=torch.arange(1), eos_ids=[], pad_id=0
        )


def test_a_model_that_decodes_otherwise_is_refused():
    model = tiny_model("llama")
    own = model.model.layers[1].forward

    def forgets(hidden_states, *args, past_key_values=None, **kwargs):
        if past_key_values is not None and hidden_states.shape[1] == 1:
            hidden_states = hidden_states + 1
        return own(hidden_states, *args, past_key_values=past_key_values, **kwargs)

    model.model.layers[1].forward = forgets
    with pytest.raises(ValueError, match="other logits token by token with a cache"):
        decode(
            LanguageModel(model), [[3]], Sampling(2), seeds=torch.arange(1), eos_ids=[], pad_id=0
        )


def test_two_threads_decode_two_models():
    models = [LanguageModel(tiny_model("llama", seed=seed)) for seed in range(2)]
    arguments = {"seeds": torch.arange(3), "eos_ids": [], "pad_id": PAD_ID}

    def run(model):
        return decode(model, [[5], [6, 7], [8]], Sampling(15), **arguments).tokens.response_ids

    expected = [run(model) for model in models]
    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: run(models[i])})) for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(2))
