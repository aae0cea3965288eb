"""Frozen weights in 4 and 8 bits under adapters: the same algorithm, a quarter of the memory.

All of it runs bitsandbytes itself, on the CPU.
"""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from tiny_adapters import split_names
from tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer
from tiny_trainer import (
    PROMPTS,
    changed,
    count_letters,
    no_model_runs,
    one_line,
    true_logprobs,
    weights,
)
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ppo_fast import PPO, PPOConfig
from ppo_fast.checkpointing import checkpoint
from ppo_fast.models.adapters import adapted_layers, merged_adapters
from ppo_fast.models.checks import to_device
from ppo_fast.models.lora import with_lora
from ppo_fast.models.quantized import (
    _Product,
    bits_of,
    check_quantization,
    constant_names,
    load_quantized,
    packed_bytes,
    prepare_quantized,
    quantized_layers,
    shared_states,
)
from ppo_fast.rewards.fit.settings import RewardModelConfig
from ppo_fast.rewards.fit.train import train_reward_model

bnb = pytest.importorskip("bitsandbytes", reason="quantised weights need bitsandbytes")
both = pytest.mark.parametrize("quantization", ["4bit", "8bit"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model = tiny_model(layers=3)
    model.generation_config.eos_token_id = list(range(0, VOCAB_SIZE, 12))
    model.save_pretrained(folder)
    return folder


def policy_of(folder, quantization, k=None, dtype=None):
    torch.manual_seed(0)
    return with_lora(load_quantized(str(folder), quantization, "cpu", dtype), 4, k)


def ppo_of(policy, **options):
    settings = {"critic": "head", "max_length": 6, "learning_rate": 1e-2, "num_epochs": 2}
    config = PPOConfig(**settings | options)
    return PPO(policy, tiny_tokenizer(), count_letters, config=config)


def dequantized(layer):
    """The weight that bitsandbytes itself makes of a layer's bits."""
    if bits_of(layer) == 4:
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    return layer.weight.data * scales[:, None] / 127


def plain(policy):
    """The same policy in float32, without bitsandbytes and peft."""
    model = tiny_model(layers=3)
    own = dict(policy.get_base_model().named_modules())
    for name, module in model.named_modules():
        source = own[name]
        layer = getattr(source, "base_layer", source)
        if bits_of(layer) is not None:
            module.weight.data = dequantized(layer).float()
        if layer is not source:
            a, b = source.lora_A["default"].weight, source.lora_B["default"].weight
            module.weight.data += source.scaling["default"] * (b @ a).detach()
    return model


@pytest.mark.slow
@both
@pytest.mark.parametrize(
    ("k", "options"),
    [
        (None, {}),
        (1, {"critic": "top"}),
        (None, {"gradient_checkpointing": True}),
        (None, {"compute_dtype": "bfloat16"}),
    ],
    ids=["head", "top", "checkpointing", "bfloat16"],
)
def test_a_step_trains_the_adapters_alone(folder, quantization, k, options):
    half = "compute_dtype" in options
    policy = policy_of(folder, quantization, k, torch.bfloat16 if half else None)
    ppo = ppo_of(policy, num_layers_unfrozen=k, **options)
    assert ppo.policy.fused
    before, critic = weights(policy), weights(ppo.critic.module)
    first, second = (ppo.step(PROMPTS).metrics for _ in range(2))
    assert changed(policy, before) == split_names(policy)[0]
    assert changed(ppo.critic.module, critic)
    assert first["kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert abs(second["kl_divergence"]) > 1e-3
    tolerance = 2e-2 if half else 2e-5
    assert max(step["first_max_log_ratio"] for step in (first, second)) < tolerance
    if half:
        return
    rollout = ppo.rollout(PROMPTS)
    forward = ppo.policy.forward(rollout.tokens)
    again = ppo.policy.logprobs(forward, rollout.tokens, temperature=1.0).logprobs
    torch.testing.assert_close(rollout.logprobs, again, rtol=1e-5, atol=2e-5)
    expected = true_logprobs(plain(policy), rollout.tokens).float()
    torch.testing.assert_close(rollout.logprobs, expected, rtol=1e-4, atol=1e-4)


@both
def test_the_reference_shares_all_that_is_quantised(folder, quantization):
    policy = policy_of(folder, quantization)
    policy(torch.arange(4)[None])  # bitsandbytes moves the bits at the first pass
    for trained in (False, True):
        if trained:
            for layer in adapted_layers(policy):
                nn.init.normal_(layer.layer.lora_B["default"].weight, std=0.05)
        reference = ppo_of(policy).reference.model
        assert bool(adapted_layers(reference)) == trained
        layers = zip(quantized_layers(policy), quantized_layers(reference), strict=True)
        assert all(mine.weight is other.weight for mine, other in layers)
        states = list(zip(shared_states(policy), shared_states(reference), strict=True))
        assert len(states) == 3 * 7
        assert all(mine is other for mine, other in states)


@both
def test_gradients_are_the_same_in_both_modes(folder, quantization):
    """In eval mode bitsandbytes' own layers give other numbers, or no gradient, on some CPUs."""
    policy = policy_of(folder, quantization)
    ids, found = torch.arange(10).reshape(2, 5), []
    for mode in (False, True):
        policy.train(mode).zero_grad()
        logits = policy(ids).logits
        logits.square().mean().backward()
        found.append([logits, *(p.grad for p in policy.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)
    downs = [p.grad for name, p in policy.named_parameters() if "lora_B" in name]
    assert all(gradient.abs().max() > 1e-6 for gradient in downs)


def test_the_product_of_8_bits_by_hand():
    codes = torch.randint(-127, 128, (5, 6), dtype=torch.int8)
    scales = torch.rand(5) + 0.5
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    weight = (codes * (scales / 127)[:, None]).double()
    expected = nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(_Product.apply(x, codes, scales, bias), expected)
    assert torch.autograd.gradcheck(lambda x, b: _Product.apply(x, codes, scales, b), (x, bias))


def loaded_by_transformers(folder, **options):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}, dtype=torch.bfloat16
    )


def test_half_precision_becomes_float32_around_the_bits(folder):
    base = loaded_by_transformers(folder, bnb_4bit_quant_storage=torch.bfloat16)
    policy = with_lora(base, 4)
    layers = quantized_layers(policy)
    bits = [layer.weight.data.clone() for layer in layers]
    assert {b.dtype for b in bits} == {torch.bfloat16}
    with pytest.warns(UserWarning, match="policy_model: its half-precision weights become float32"):
        ppo = ppo_of(policy)
    packed = {id(layer.weight) for layer in layers}
    others = {p.dtype for p in policy.parameters() if id(p) not in packed}
    assert others == {torch.float32}
    assert ppo.step(PROMPTS).metrics["first_max_log_ratio"] < 2e-5
    for layer, before in zip(layers, bits, strict=True):
        assert torch.equal(layer.weight.data.view(torch.uint8), before.view(torch.uint8))
    with merged_adapters(policy):
        assert len(adapted_layers(policy)) == 3 * 7


def test_adapters_of_a_reward_model_are_refused_before_it_is_trained(folder):
    model, tokenizer = loaded_by_transformers(folder), tiny_tokenizer()
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with no_model_runs(), pytest.raises(ValueError, match="model: its weights are quantised, and"):
        train_reward_model(
            model, tokenizer, [row], config=RewardModelConfig(lora_rank=2), held_out=None
        )


def test_bits_that_bitsandbytes_rewrote_for_the_processor_come_back(folder):
    base = loaded_by_transformers(folder)
    (layer, *_) = (la for la in quantized_layers(base) if la.out_features % 32 == 0)
    before, weight = layer.weight.data.clone(), dequantized(layer)
    rewrite = bnb.functional._convert_weight_packed_for_cpu
    layer.weight.data, _ = rewrite(layer.weight.data, layer.weight.quant_state)
    assert layer.weight.shape != before.shape
    prepare_quantized(base, None)
    assert torch.equal(layer.weight.data, before)
    torch.testing.assert_close(dequantized(layer), weight, rtol=1e-2, atol=1e-3)
    x = torch.randn(3, layer.in_features)
    found = layer.eval()(x)
    assert torch.equal(layer.weight.data, before)
    assert torch.equal(found, layer.train()(x.requires_grad_()))


def test_a_quantised_head_means_the_ordinary_path(folder):
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["nothing"])
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    assert bits_of(base.get_output_embeddings()) == 8
    other = copy.deepcopy(base)
    policy = with_lora(base, 4)
    ppo = ppo_of(policy)
    assert not ppo.policy.fused
    assert ppo.policy.reason == "the LM head is a WeightOnly8bit, not a torch.nn.Linear"
    assert ppo.step(PROMPTS).metrics["first_max_log_ratio"] < 2e-5
    config = PPOConfig(critic="head", max_length=6)
    given = PPO(policy, tiny_tokenizer(), count_letters, reference_model=other, config=config)
    layers = quantized_layers(given.reference.model)
    assert {type(layer).__name__ for layer in layers} == {"WeightOnly8bit"}
    assert not any(p.requires_grad for p in other.parameters())


@both
def test_a_run_goes_on_from_the_adapters_alone(folder, tmp_path, quantization):
    ppo = ppo_of(policy_of(folder, quantization))
    ppo.step(PROMPTS)
    path = ppo.save_checkpoint(tmp_path, 1)
    saved = checkpoint.load(path)["models"]["policy"]
    assert saved.keys() == split_names(ppo.policy.model)[0]
    assert constant_names(ppo.policy.model)
    expected = ppo.step(PROMPTS).metrics
    resumed = ppo_of(policy_of(folder, quantization))
    assert resumed.load_checkpoint(path) == 1
    found = resumed.step(PROMPTS).metrics
    assert found["policy_loss"] == expected["policy_loss"]

    tiny_model(layers=3, seed=1).save_pretrained(tmp_path / "other")
    stranger = ppo_of(policy_of(tmp_path / "other", quantization))
    with pytest.raises(ValueError, match="other frozen weights than the trainer's"):
        stranger.load_checkpoint(path)


@both
def test_fast_paths_say_why_layers_are_not_fused(folder, quantization, caplog):
    ppo = ppo_of(policy_of(folder, quantization))
    with caplog.at_level("INFO"):
        ppo.rollout(PROMPTS)
    assert f"no fused layers (layer 0: its weights are in {quantization[0]} bits" in caplog.text


@both
def test_packed_bytes_are_those_of_the_state(quantization):
    layer = bnb.nn.Linear4bit(256, 384, bias=False, quant_type="nf4")
    if quantization == "8bit":
        layer = bnb.nn.Linear8bitLt(256, 384, bias=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    held = {name: t.nbytes for name, t in layer.state_dict().items()}
    names = [name for name in held if "format" not in name and "quant_state" not in name]
    expected = packed_bytes(torch.empty(384, 256), quantization)
    assert sum(held[name] for name in names) == pytest.approx(expected, abs=8)


def test_what_is_refused(folder, monkeypatch):
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="quantization: got '2bit', expected '4bit' or '8bit'"):
        check_quantization("2bit", cpu)
    with pytest.raises(ValueError, match="no kernels for 'meta'; use one of cpu, cuda") as error:
        check_quantization("4bit", torch.device("meta"))
    assert one_line(error)
    base = load_quantized(str(folder), "4bit", cpu)
    with pytest.raises(ValueError, match=r"policy_model: is quantised .*device_map=\{'': 'meta'\}"):
        to_device(base, "policy_model", torch.device("meta"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install 'ppo_fast\[quantized\]"):
        load_quantized(str(folder), "4bit", cpu)


def test_whatever_is_read_of_a_plain_model_is_nothing():
    model = tiny_model()
    before = weights(model)
    prepare_quantized(model, None)
    assert not quantized_layers(model)
    assert not constant_names(model)
    assert not changed(model, before)
