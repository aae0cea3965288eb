"""Fast paths are taken: the kernel runs for every layer of the families that support it, and a
path that is not taken is logged."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch
from tiny_models import PAD_ID, tiny_model
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from ppo_fast.models import precision
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.precision import WeightCopies
from ppo_fast.ops import _C
from ppo_fast.rollout import LocalEngine, Sampling
from ppo_fast.rollout.speedups.fast_paths import fast_paths
from ppo_fast.rollout.speedups.slot_check import check_layers

# Those that the documentation calls fast, and others whose layers are of the same kind, some of
# which older transformers lack.
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "smollm3", "gpt2"]
FAMILIES += ["gemma", "gemma2", "gemma3_text"]
MORE = ["ministral", "seed_oss", "exaone", "internlm3", "iquestcoder"]
LAYERS = 3


def model_of(family, **options):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    sizes |= {"num_hidden_layers": LAYERS, "intermediate_size": 131, "vocab_size": 307}
    sizes |= {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    if family == "gpt2":  # its config takes some sizes by names of its own alone
        sizes = {("n_inner" if k == "intermediate_size" else k): v for k, v in sizes.items()}
    config = AutoConfig.for_model(family, **sizes, **options)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def generate(model, **options):
    engine = LocalEngine(model, eos_ids=list, pad_id=PAD_ID, **options)
    return engine.generate([[3, 9], [4, 5, 6]], Sampling(5), seeds=torch.arange(2))


@pytest.fixture
def kernel_calls(monkeypatch):
    """Count the calls of each layer's kernel, by the order in which the kernels were made."""
    calls, made, own = Counter(), [], _C.DecodeLayer

    class Counted:
        def __init__(self, arguments):
            self.kernel, self.place = own(arguments), len(made)
            made.append(self)

        def __call__(self, **arguments):
            calls[self.place] += 1
            self.kernel(**arguments)

    monkeypatch.setattr(_C, "DecodeLayer", Counted)
    return calls, made


@pytest.mark.parametrize("family", FAMILIES + MORE)
def test_the_kernel_runs_for_every_layer(family, kernel_calls):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {family}")
    model = LanguageModel(model_of(family))
    assert check_layers(model) == (LAYERS, None, False)
    calls, made = kernel_calls
    calls.clear()
    made.clear()
    generate(model)
    # the prompts of both together, and a step for each token but the first
    assert calls == dict.fromkeys(range(LAYERS), 1 + 4)


def test_layers_of_two_kinds_rotate_by_their_own_tables():
    """The layers of a step share what is checked of its rows, but not across kinds."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = model_of("gemma3_text", layer_types=kinds)
    tables = [
        model.model.rotary_emb(torch.ones(1), torch.tensor([[5]]), kind) for kind in kinds[:2]
    ]
    assert not torch.equal(tables[0][0], tables[1][0])
    assert check_layers(LanguageModel(model)) == (LAYERS, None, False)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2"])
def test_copies_in_bfloat16_take_the_kernel_too(family, kernel_calls):
    """What is sampled agrees with the update, which computes in float32 under autocast."""
    raw = model_of(family, initializer_range=0.15)
    model = LanguageModel(raw, compute_dtype=torch.bfloat16)
    copies = WeightCopies(torch.bfloat16)
    with copies.in_use(raw):
        assert check_layers(model) == (LAYERS, None, False)
        calls, made = kernel_calls
        calls.clear()
        made.clear()
        rollout = generate(model)
    assert calls == dict.fromkeys(range(LAYERS), 1 + 4)
    assert raw.get_input_embeddings().forward(torch.tensor([3])).dtype == torch.float32

    tokens = rollout.tokens
    with torch.no_grad():
        update = model.logprobs(model.forward(tokens), tokens, temperature=1.0).logprobs
        exact = LanguageModel(raw).forward(tokens)
        truth = LanguageModel(raw).logprobs(exact, tokens, temperature=1.0).logprobs
    error = (update - truth).abs().mean()
    assert (rollout.logprobs - update).abs().mean() <= 3 * error


def test_fused_layers_of_a_deep_model_in_bfloat16_are_judged_by_float32(monkeypatch):
    """Its own layers round so often that fused ones, which are more exact, differ from them."""
    raw = tiny_model("llama", layers=24).bfloat16()
    dtypes = {name: p.dtype for name, p in raw.named_parameters()}
    assert check_layers(LanguageModel(raw)) == (24, None, False)
    assert dtypes == {name: p.dtype for name, p in raw.named_parameters()}
    monkeypatch.setattr(precision, "EXACT_BYTES", 2**10)
    too_large = check_layers(LanguageModel(raw))
    assert (too_large.number, too_large.failed) == (0, True)
    assert "logits differ by" in too_large.why_not


def test_trunk_states_of_copies_in_bfloat16_are_in_bfloat16():
    """Fused layers pass on float32; the trunk states of one rollout are those of the other."""
    raw = model_of("llama")
    model = LanguageModel(raw, num_layers_unfrozen=1, compute_dtype=torch.bfloat16)
    with WeightCopies(torch.bfloat16).in_use(raw):
        assert check_layers(model).number == LAYERS
        trunk_states = generate(model, whole_trunk=True).trunk_states
    exact = generate(LanguageModel(raw, num_layers_unfrozen=1), whole_trunk=True).trunk_states
    assert trunk_states.states.dtype == torch.bfloat16
    prompts = torch.tensor([0, 1, 7, 8, 9])  # responses may differ
    found, truth = trunk_states.states[prompts].float(), exact.states[prompts]
    assert (found - truth).abs().max() <= 0.02 * truth.abs().max()


def test_a_rollout_logs_its_fast_paths_once(caplog):
    model = LanguageModel(tiny_model("llama", layers=LAYERS), num_layers_unfrozen=1)
    with caplog.at_level(logging.INFO, "ppo_fast"):
        generate(model)
        generate(model)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage() == (
        "fast paths of LlamaForCausalLM: fused LM head, frozen trunk, packed passes, "
        "3 of 3 layers fused, products of few rows"
    )


def test_a_rollout_logs_paths_not_taken_with_reason_and_cost(caplog):
    model = LanguageModel(tiny_model("gpt_neox"))
    with caplog.at_level(logging.INFO, "ppo_fast"):
        generate(model)
    (record,) = caplog.records
    assert record.levelno == logging.INFO, "its layers are of another kind: nothing is wrong"
    assert record.getMessage() == (
        "fast paths of GPTNeoXForCausalLM: fused LM head, "
        "no frozen trunk (num_layers_unfrozen is None: every pass computes every layer), "
        "packed passes, "
        "no fused layers (layer 0: it has no mlp.down_proj.weight: decoding takes 1.2 to 1.6 "
        "times as long), products of few rows"
    )


def test_a_layer_that_is_not_fused_is_named():
    raw = tiny_model("llama", layers=LAYERS)
    raw.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    found = {path.name: path for path in fast_paths(LanguageModel(raw))}
    path = found["2 of 3 layers fused"]
    assert path.in_force
    assert str(path) == "2 of 3 layers fused (layer 1: its mlp was changed or has hooks)"


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("ministral3", {}, "its self_attn uses get, get_llama_4_attn_scale, rope_parameters"),
        ("granite", {"residual_multiplier": 0.5}, "its forward has residual_multiplier 0.5"),
        ("smollm3", {"no_rope_layers": [1, 1, 0]}, "layer 2: its self_attn has use_rope 0"),
        ("helium", {}, "its self_attn rotates other pairs of numbers than Llama's"),
        ("ernie4_5", {}, "its self_attn rotates other pairs of numbers than Llama's"),
        ("glm4_moe", {"first_k_dense_replace": 3}, "it does not rotate whole heads"),
    ],
)
def test_layers_that_compute_more_than_the_kernel_are_not_fused(family, options, reason):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {family}")
    layers = check_layers(LanguageModel(model_of(family, **options)))
    assert layers.number == (2 if family == "smollm3" else 0)
    assert reason in layers.why_not
    assert not layers.failed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_fail_the_comparison_are_a_warning(caplog, monkeypatch, dtype):
    monkeypatch.setattr("ppo_fast.models.llama_layers._why_not_llama_rotation", lambda *_: None)
    # it rotates other pairs of numbers
    model = LanguageModel(model_of("helium", initializer_range=0.15).to(dtype))
    generate(model)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "no fused layers (with them, logits differ by" in record.getMessage()


def test_layers_that_are_never_reached_are_a_warning(caplog, monkeypatch):
    """transformers 5.24, for example, renamed the argument that takes the cache."""
    monkeypatch.setattr(
        "ppo_fast.rollout.speedups.step_forward.cache_argument", lambda _: "renamed"
    )
    model = LanguageModel(tiny_model("llama"))
    generate(model)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "no fused layers (a step does not reach the kernels of 2 layers" in record.getMessage()


def test_a_head_that_fails_the_comparison_is_a_warning(caplog):
    raw = tiny_model("llama")
    own = raw.lm_head.forward
    raw.lm_head.forward = lambda x: own(x) * 1.5
    generate(LanguageModel(raw))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "no fused LM head (the body's states times the LM head differ" in record.getMessage()


def test_without_the_kernels_the_reason_is_given(monkeypatch):
    monkeypatch.setenv("PPO_FAST_IMPL", "reference")
    found = {path.name: path for path in fast_paths(LanguageModel(tiny_model("llama")))}
    for name in ("fused layers", "products of few rows"):
        assert not found[name].in_force
        assert found[name].why_not.startswith("reference operations: ")


# NaN


def no_numbers(module, query, *_, **__):
    """Attention that returns NaN."""
    return torch.full_like(query.transpose(1, 2), torch.nan), None


@pytest.fixture
def nan_attention(monkeypatch):
    from transformers import AttentionInterface

    own = AttentionInterface()["sdpa"]
    yield lambda: AttentionInterface.register("sdpa", no_numbers)
    AttentionInterface.register("sdpa", own)


ATTENTION = (
    r"^policy_model: attention gave NaN for a few tokens of LlamaForCausalLM, whose weights are "
    r"finite .*attn_implementation='sdpa'.* load it with attn_implementation='eager'$"
)


@pytest.mark.parametrize("k", [None, 1])
def test_nan_of_attention_is_an_error(nan_attention, k):
    raw = tiny_model("llama")
    nan_attention()
    with pytest.raises(ValueError, match=ATTENTION):
        LanguageModel(raw, num_layers_unfrozen=k)


def test_nan_of_attention_in_decoding_is_an_error(nan_attention):
    model = LanguageModel(tiny_model("llama"))
    nan_attention()
    with pytest.raises(ValueError, match=ATTENTION):
        generate(model)


def test_nan_of_a_weight_is_an_error():
    raw = tiny_model("llama")
    with torch.no_grad():
        raw.model.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"its weight model\.norm\.weight holds NaN or infinite"):
        LanguageModel(raw)
