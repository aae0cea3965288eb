"""What transformers_internals.py assumes about transformers, one test per
assumption: a test that fails after a new release names what changed."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from llama_like import each_llama_like, first_layer, layers, llama_like
from tiny_models import FAMILIES, tiny_config, tiny_model
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)

from ppo_fast.models import transformers_internals as internals
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.rollout import TransformersEngine

IDS = torch.tensor([[5, 6, 7, 8]])
needs_continuous_batching = pytest.mark.skipif(
    internals.why_no_continuous_batching() is not None,
    reason=str(internals.why_no_continuous_batching()),
)
each_family = pytest.mark.parametrize("family", FAMILIES)


def handed_to_layers(model, **arguments):
    """Return the arguments with which the body calls its first layer, and the layer's output."""
    seen = []
    handle = layers(model)[0].register_forward_hook(
        lambda _, args, kwargs, output: seen.append((args, kwargs, output)), with_kwargs=True
    )
    with torch.no_grad():
        model.base_model(**arguments)
    handle.remove()
    return seen[0]


# Attention


def handed_to_attention(model):
    """Return the names of attention's options besides queries, keys, values, mask and scaling."""
    seen = []

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
        seen.append({name for name, value in options.items() if value is not None})
        return query.transpose(1, 2), None

    AttentionInterface.register("of_these_tests", attention)
    AttentionMaskInterface.register("of_these_tests", lambda *_, **__: None)
    before = internals.attention_of(model.config)
    with torch.no_grad(), internals.attention_set_to("of_these_tests", model.config):
        model(IDS)
    assert internals.attention_of(model.config) == before
    count = len(seen)
    with torch.no_grad():
        model(IDS)
    assert len(seen) == count, "its own attention again"
    return seen


@each_llama_like
def test_attention_is_looked_up_at_every_call(family):
    assert len(handed_to_attention(llama_like(family))) == 1


@pytest.mark.parametrize(("family", "extra"), [("gemma2", "softcap"), ("gpt_oss", "s_aux")])
def test_what_some_models_add_to_attention(family, extra):
    assert extra in internals.ATTENTION_EXTRAS
    try:
        handed = handed_to_attention(llama_like(family))
    except NotImplementedError:
        pytest.skip("PyTorch 2.8 has no product of GPT-OSS's experts on the CPU")
    assert extra in handed[0]


def test_the_window_of_attention_is_handed_to_it():
    config = tiny_config("mistral", layers=1)
    config.sliding_window, config.num_key_value_heads = 4, 2
    (options,) = handed_to_attention(AutoModelForCausalLM.from_config(config))
    assert "sliding_window" in options


# Arguments


@each_family
@pytest.mark.parametrize("part", ["model", "body"])
def test_the_argument_that_takes_the_cache(family, part):
    model = tiny_model(family)
    module = {"model": model, "body": model.base_model}[part]
    name = internals.cache_argument(module)
    assert name in inspect.signature(type(module).forward).parameters
    cache = internals.Cache(layers=[Recorded(), Recorded()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(input_ids=IDS, **{name: cache}, use_cache=True)
    assert "update" in cache.layers[0].calls


def test_a_wrapper_takes_the_cache_as_what_it_wraps_does():
    model = tiny_model("llama")
    assert internals.cache_argument(nn.Sequential(model)) == internals.cache_argument(model)


@each_llama_like
def test_a_body_hands_its_layers_the_cache_by_name(family):
    layer, cache = first_layer(family), internals.Cache(layers=[Recorded()])
    model = llama_like(family)
    name = internals.cache_argument(model)
    _, kwargs, _ = handed_to_layers(model, input_ids=IDS, **{name: cache}, use_cache=True)
    name = internals.cache_argument(layer)
    assert kwargs.get(name) is cache, f"the layer was called with {sorted(kwargs)}"


@each_family
def test_a_layer_takes_states_and_returns_a_tensor_of_them(family):
    args, kwargs, output = handed_to_layers(tiny_model(family), input_ids=IDS)
    given = internals.layer_input(args, kwargs)
    assert given.shape == (1, 4, 64)
    assert isinstance(output, Tensor), "not a tuple"
    assert output.shape == given.shape


def test_a_layer_is_called_with_position_embeddings():
    _, kwargs, _ = handed_to_layers(tiny_model("llama"), input_ids=IDS)
    cos, sin = kwargs["position_embeddings"]
    assert cos.shape == sin.shape == (1, 4, 16)


# The cache


class Recorded(internals.DynamicLayer):
    """A cache layer that records the calls of the methods that SlotCache's layers override."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def update(self, key_states, value_states, *args, **kwargs):
        self.calls.append("update")
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self):
        self.calls.append("get_seq_length")
        return super().get_seq_length()

    def get_mask_sizes(self, query_length):
        assert isinstance(query_length, int), "the number of new tokens"
        self.calls.append("get_mask_sizes")
        return super().get_mask_sizes(query_length)


@each_family
def test_models_call_what_a_cache_layer_overrides(family):
    model, recorded = tiny_model(family), [Recorded(), Recorded()]
    LanguageModel(model).next(input_ids=IDS, cache=internals.Cache(layers=recorded))
    assert set(recorded[0].calls) == {"update", "get_seq_length", "get_mask_sizes"}
    assert recorded[1].calls.count("update") == 1


def test_a_cache_layer_knows_whether_it_is_initialized():
    layer = internals.DynamicLayer()
    assert layer.is_initialized is False
    assert list(inspect.signature(layer.lazy_initialization).parameters) == [
        "key_states",
        "value_states",
    ]


# Configurations and masks


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("llama", {}, [internals.FULL] * 2),
        ("gpt2", {}, [internals.FULL] * 2),
        ("gemma2", {}, [internals.SLIDING, internals.FULL]),
        ("qwen2", {}, [internals.FULL] * 2),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, None),
        ("mistral", {"sliding_window": 4}, [internals.SLIDING] * 2),
        ("mistral", {"sliding_window": None}, [internals.FULL] * 2),
    ],
)
def test_layer_types(family, options, expected):
    config = AutoConfig.for_model(family, num_hidden_layers=2, **options)
    assert internals.layer_types(config) == (expected or [internals.FULL, internals.SLIDING])
    mixed = len(set(internals.layer_types(config))) > 1
    assert internals.mask_is_by_type(config) == mixed


@each_family
def test_a_mask_of_four_dimensions_is_used_as_it_is(family):
    model = tiny_model(family)
    seen = torch.ones(4, 4).tril().bool()
    seen[3, 1] = False  # a mask of two dimensions cannot express this
    mask = torch.zeros(1, 1, 4, 4).masked_fill(~seen, torch.finfo(torch.float32).min)
    if internals.mask_is_by_type(model.config):
        mask = dict.fromkeys(internals.layer_types(model.config), mask)
    with torch.no_grad():
        masked, whole = (
            model(input_ids=IDS, attention_mask=m, position_ids=torch.arange(4)[None]).logits
            for m in (mask, None)
        )
    torch.testing.assert_close(masked[:, :3], whole[:, :3])
    assert (masked[:, 3] - whole[:, 3]).abs().max() > 1e-2


def test_rows_of_a_cache_are_kept_by_its_layers_own_method():
    """tests/rollout/test_own_cache.py has models whose numbers are then right."""
    layer = internals.DynamicLayer()
    layer.update(torch.arange(12.0).reshape(3, 1, 2, 2), torch.zeros(3, 1, 2, 2))
    cache = internals.Cache(layers=[layer])
    internals.keep_rows(("past_key_values", cache, 2), torch.tensor([2, 0]))
    assert layer.keys[:, 0, 0, 0].tolist() == [8, 0]
    assert layer.values.shape == (2, 1, 2, 2)

    class Own(internals.DynamicLayer):
        pass

    cache = internals.Cache(layers=[layer, Own()])
    with pytest.raises(ValueError, match="its cache has layers of its own: Own"):
        internals.keep_rows(("past_key_values", cache, 2), torch.tensor([0]))


def test_logit_scale():
    assert internals.logit_scale(tiny_config("cohere")) == 0.75
    assert internals.logit_scale(tiny_config("llama")) == 1


def test_softcap():
    assert internals.softcap(AutoConfig.for_model("gemma2")) == 30
    assert internals.softcap(tiny_config("llama")) is None


# Other


def test_products_of_gpt2_are_conv1d():
    layer = layers(tiny_model("gpt2"))[0]
    assert type(layer.attn.c_attn) is internals.Conv1D
    assert layer.attn.c_attn.weight.shape == (64, 3 * 64)


def test_an_older_generate_batch_is_refused(monkeypatch):
    monkeypatch.setattr(internals, "ContinuousBatchingConfig", object)
    with pytest.raises(RuntimeError, match=r"^TransformersEngine needs transformers >= 5\.9"):
        TransformersEngine(tiny_model("llama"), eos_ids=[], pad_id=1)


@needs_continuous_batching
def test_generate_batch_numbers_its_requests_and_says_what_it_did():
    config = internals.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    assert hasattr(config, "return_logprobs")
    config.return_logprobs = True
    prompts = [[5, 6, 7], [8], [9, 10]]
    outputs = tiny_model("llama").generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=2, eos_token_id=-1, pad_token_id=1),
        continuous_batching_config=config,
    )
    found = internals.in_order_of_requests(dict(reversed(outputs.items())))
    assert [list(output.prompt_ids) for output in found] == prompts
    assert all(len(o.generated_tokens) == len(o.logprobs) == 2 and not o.error for o in found)


def test_saving_asks_for_the_quantizer():
    """as_float_model removes it from a model read from a GGUF; test_smollm2.py converts one."""
    assert "hf_quantizer" in inspect.getsource(PreTrainedModel.save_pretrained)


def test_the_peft_version_that_add_adapter_needs():
    from transformers.integrations import peft

    assert peft.MIN_PEFT_VERSION[0].isdigit()
    assert "MIN_PEFT_VERSION" in inspect.getsource(PreTrainedModel.add_adapter)


@pytest.mark.parametrize("found", ["0.1.0", "99.0"])
def test_an_older_peft_is_reported(monkeypatch, found):
    monkeypatch.setattr(internals, "version", lambda _: found)
    reason = internals.why_no_add_adapter()
    assert (reason is None) == (found == "99.0")
    assert reason is None or "found 0.1.0; update it, or use peft.get_peft_model(" in reason
