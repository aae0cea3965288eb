"""Small models with layers of Llama's kind."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from ppo_fast.models.parts import layer_list

LLAMA_LIKE = ["llama", "qwen2", "qwen3", "mistral", "smollm3"]
each_llama_like = pytest.mark.parametrize("family", LLAMA_LIKE)


def llama_like(family):
    """Return a model with one layer and heads of width 8."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model(
        family, num_hidden_layers=1, intermediate_size=48, vocab_size=50, pad_token_id=0, **sizes
    )
    return AutoModelForCausalLM.from_config(config)


def first_layer(family):
    return layers(llama_like(family))[0]


def layers(model):
    return list(layer_list(model.base_model))
