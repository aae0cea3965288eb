"""Models that decode, or compute in batches, something other than the update: refused by name."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS, count_letters
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer

from ppo_fast import PPO, PPOConfig

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 307, "intermediate_size": 48}
SIZES |= {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None, "num_hidden_layers": 2}


def model_of(family, **options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | options)).eval()


def ppo_of(model, tokenizer=None, **options):
    config = PPOConfig(**({"critic": "head", "max_length": 4} | options))
    return PPO(model, tokenizer or tiny_tokenizer(), count_letters, config=config)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_models_in_which_tokens_see_later_ones(family):
    with pytest.raises(TypeError, match=r"policy_model: \w+ is not causal: .* is_decoder=True"):
        ppo_of(model_of(family, pad_token_id=1))


def test_a_reformer():
    sizes = {"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "is_decoder": True}
    with pytest.raises(TypeError, match="policy_model: ReformerModelWithLMHead sorts tokens"):
        ppo_of(model_of("reformer", **sizes))


def decodes(kwargs):
    return kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None


def shift_in_wide_batches(module, args, kwargs, states):
    return None if decodes(kwargs) else states + 0.3 * (states.shape[1] > 6)


@pytest.mark.parametrize("options", [{}, {"num_layers_unfrozen": 1}], ids=str)
def test_rows_that_depend_on_the_rows_beside_them(options):
    model = tiny_model(layers=2)
    model.model.layers[1].register_forward_hook(shift_in_wide_batches, with_kwargs=True)
    words = "over a row alone, and over it in a padded batch"
    with pytest.raises(ValueError, match=f"policy_model: .*{words}"):
        ppo_of(model, **options)


def test_a_head_of_zeros_trains():
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    ppo = ppo_of(model, learning_rate=1e-2)
    assert ppo.policy.fused
    for _ in range(2):
        assert ppo.step(PROMPTS).metrics["first_max_log_ratio"] < 1e-5
    assert model.lm_head.weight.any()


def test_a_tokenizer_of_bytes():
    tokenizer = ByT5Tokenizer()
    model = model_of("llama", vocab_size=384, num_key_value_heads=2)
    assert ppo_of(model, tokenizer).step(PROMPTS).metrics["first_max_log_ratio"] < 1e-5


def test_more_rows_than_the_config_names():
    model = model_of("llama", num_key_value_heads=2)
    model.resize_token_embeddings(320)
    model.config.vocab_size = 307
    assert ppo_of(model).step(PROMPTS).metrics["first_max_log_ratio"] < 1e-5


def test_more_logits_than_embeddings():
    model = model_of("llama", num_key_value_heads=2, tie_word_embeddings=False)
    model.lm_head = torch.nn.Linear(32, 320, bias=False)
    with pytest.raises(
        ValueError, match="policy_model: LlamaForCausalLM gives 320 logits but has 307 embeddings"
    ):
        ppo_of(model)
