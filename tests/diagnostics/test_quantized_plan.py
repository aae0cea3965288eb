"""The memory plan of a policy in 4 or 8 bits, against the tensors of a real one."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from tiny_models import tiny_config, tiny_model, tiny_tokenizer
from tiny_trainer import count_letters

from ppo_fast import PPO, PPOConfig
from ppo_fast.cli.main import main
from ppo_fast.diagnostics.memory_plan import plan_memory, plans
from ppo_fast.models.lora import with_lora
from ppo_fast.models.quantized import load_quantized, quantized_layers

pytest.importorskip("bitsandbytes", reason="quantised weights need bitsandbytes")

SIZES = {"batch_size": 6, "prompt_length": 4}


def held(policy):
    """The bytes of all parameters, and of the constants of quantised layers."""
    constants = [
        tensor
        for layer in quantized_layers(policy)
        for name, tensor in layer.state_dict().items()
        if name not in ("weight", "weight_format") and "quant_state" not in name
    ]
    return sum(t.nbytes for t in [*policy.parameters(), *constants])


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("compute_dtype", [None, "bfloat16"])
def test_a_plan_counts_the_bits(tmp_path, quantization, compute_dtype):
    tiny_model(layers=3, hidden=128).save_pretrained(tmp_path)
    half = None if compute_dtype is None else torch.bfloat16
    policy = with_lora(load_quantized(str(tmp_path), quantization, "cpu", half), 4)
    config = PPOConfig(critic="head", max_length=6, compute_dtype=compute_dtype)
    ppo = PPO(policy, tiny_tokenizer(), count_letters, config=config)
    plan = ppo.memory_plan(**SIZES)
    assert plan.policy == pytest.approx(held(policy), rel=2e-3)
    float32 = plan_memory(
        policy.config, config, adapter=policy.peft_config["default"], device="cpu", **SIZES
    )
    assert plan.policy < 0.75 * float32.policy
    if compute_dtype is None:
        assert plan.copies == 0, "no merged weights"
        assert float32.copies > 0
    # layers in 4 or 8 bits are not fused, which cache float32
    assert plan.cache == (float32.cache if half is None else float32.cache / 2)
    same = {f.name for f in fields(plan)} - {"policy", "copies", "reference", "cache"}
    assert all(getattr(plan, name) == getattr(float32, name) for name in same)
    assert plan.reference == 0


def test_the_table_of_a_config():
    config = tiny_config("llama", layers=8, hidden=256)
    ppo_config = PPOConfig(max_length=8)
    plain, packed = (
        plans(config, ppo_config, quantization=quantization, **SIZES)
        for quantization in (None, "4bit")
    )
    assert len(plain) == len(packed)
    assert [name for name in packed if "bit" in name] == [
        "LoRA of rank 16 on 4 bits, a value head",
        "LoRA on 4 top layers, 4bit, a value head",
    ]
    for (name, one), (other, two) in zip(plain.items(), packed.items(), strict=True):
        assert (one == two) == (name == other)
        assert two.policy <= one.policy


def test_the_command_shows_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    tiny_config("llama").save_pretrained(tmp_path)
    main(["plan", "--policy", str(tmp_path), "--quantization", "8bit", "--max-length", "8"])
    assert "8 bits" in " ".join(capsys.readouterr().out.split())
