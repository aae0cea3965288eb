"""Passes of the update may be in train mode; what is random there is off, or refused."""

from __future__ import annotations

import os

import peft
import pytest
import torch
from tiny_models import tiny_tokenizer
from tiny_trainer import PROMPTS, count_letters, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from ppo_fast import PPOConfig, PPOTrainer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 307}
SIZES |= {"intermediate_size": 48, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 0}
SIZES_MOE = {"num_key_value_heads": 2, "num_local_experts": 4}


def model_of(family, **sizes):
    config = AutoConfig.for_model(family, **SIZES | sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def phimoe():
    """Its routers draw experts; its threshold for that, which is no noise, makes many likely."""
    noise = {"router_jitter_noise": 0.5, "input_jitter_noise": 0.5}
    return model_of("phimoe", **SIZES_MOE, **noise)


def dbrx():
    experts = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.9}
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2}
    attention = {"rope_theta": 1e4, "clip_qkv": 2.0}
    return model_of("dbrx", ffn_config=experts, attn_config=attention, **sizes)


def big_bird():
    """Its first pass over few tokens makes new attention layers, with the config's dropout."""
    model = model_of("big_bird", is_decoder=True, attention_type="block_sparse")
    return peft.get_peft_model(model.eval(), peft.LoraConfig(r=4, target_modules=["dense"]))


def with_adapter(config):
    model = peft.get_peft_model(tiny_model(layers=2), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.normal_(std=0.3 if "boft" in name else 0.1)
    return model


MODELS = {
    "router jitter": lambda: model_of("mixtral", **SIZES_MOE, router_jitter_noise=0.9),
    "PhiMoE": phimoe,
    "DBRX": dbrx,
    "BigBird": big_bird,
    "LoHa": lambda: with_adapter(
        peft.LoHaConfig(r=4, target_modules=["q_proj", "up_proj"], module_dropout=0.5)
    ),
    "LoKr": lambda: with_adapter(
        peft.LoKrConfig(r=4, target_modules=["q_proj", "up_proj"], module_dropout=0.5)
    ),
    "BOFT": lambda: with_adapter(
        peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"], boft_dropout=0.5)
    ),
    "LoRA": lambda: with_adapter(
        peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.5)
    ),
}


def trainer_of(model):
    config = PPOConfig(critic="head", max_length=6, gradient_checkpointing=True)
    return PPOTrainer(model, None, count_letters, tiny_tokenizer(), "cpu", config=config)


@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor")
@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension")
@pytest.mark.parametrize("kind", MODELS)
def test_the_update_trains_what_was_sampled(kind, monkeypatch):
    # peft's BOFT sets these, for an extension that needs CUDA, and leaves them set
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, os.environ.get(name, "cc" if name == "CC" else "c++"))
    model = MODELS[kind]()
    metrics = trainer_of(model).train_step(PROMPTS)
    assert metrics["first_max_log_ratio"] < 1e-5


def test_what_stays_random_is_refused():
    model = tiny_model(layers=2)
    mlp = model.model.layers[0].mlp
    mlp.register_forward_hook(
        lambda module, _, y: y * torch.rand_like(y) if module.training else None
    )
    with pytest.raises(ValueError, match="policy_model: in train mode, logits of LlamaForCausalLM"):
        trainer_of(model)
