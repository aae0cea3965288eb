"""Adapters on experts, on embeddings and on single tokens; families that mix dtypes."""

from __future__ import annotations

import peft
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS, count_letters
from transformers import AutoConfig, AutoModelForCausalLM

from ppo_fast import PPO, PPOConfig
from ppo_fast.models.lora import with_lora
from ppo_fast.rollout.own_cache import own_cache

SIZES = {"vocab_size": 307, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
SIZES |= {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}


def model_of(family, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | options)
    return AutoModelForCausalLM.from_config(config).eval()


def adapted(**options):
    config = {"r": 4, "target_modules": ["q_proj"]} | options
    return peft.get_peft_model(tiny_model(layers=2), peft.LoraConfig(**config))


def mixtral():
    return model_of(
        "mixtral", num_key_value_heads=2, intermediate_size=48, num_local_experts=4
    )  # fmt: skip


ADAPTED = {
    "experts": lambda: peft.get_peft_model(
        mixtral(),
        peft.LoraConfig(
            r=4,
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
    ),
    "every product beside experts": lambda: with_lora(mixtral(), 4),
    "embedding": lambda: adapted(target_modules=["q_proj", "embed_tokens"]),
    "head": lambda: adapted(target_modules=["q_proj", "lm_head"]),
    "tokens": lambda: adapted(trainable_token_indices=[5, 6]),
    "saved modules": lambda: adapted(modules_to_save=["embed_tokens", "lm_head"]),
}


def ppo_of(model, **options):
    settings = {"critic": "head", "max_length": 6, "learning_rate": 1e-3} | options
    return PPO(model, tiny_tokenizer(), count_letters, config=PPOConfig(**settings))


@pytest.mark.filterwarnings("ignore:.*target_parameters")
@pytest.mark.parametrize("kind", ADAPTED)
@pytest.mark.parametrize("compute_dtype", [None, "bfloat16"])
def test_adapters_train_and_are_sampled_from(kind, compute_dtype):
    model = ADAPTED[kind]()
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    ppo = ppo_of(model, compute_dtype=compute_dtype)
    for _ in range(2):
        metrics = ppo.step(PROMPTS).metrics
    assert metrics["first_max_log_ratio"] < (1e-4 if compute_dtype is None else 0.1)
    moved = {n for n, p in model.named_parameters() if n in trained and (p != trained[n]).any()}
    assert {n.split(".")[-3] for n in moved} >= {n.split(".")[-3] for n in trained if "_B" in n}
    if compute_dtype is None:
        rollout = ppo.rollout(PROMPTS)
        tokens = rollout.tokens
        pairs = zip(tokens.sequences(), tokens.prompt_lengths.tolist(), strict=True)
        with torch.no_grad():  # in float32: transformers' experts have no float64
            for found, (ids, n) in zip(rollout.logprobs, pairs, strict=True):
                expected = model(input_ids=ids[None]).logits[0, n - 1 : -1].log_softmax(-1)
                expected = expected.gather(1, ids[n:, None])[:, 0]
                torch.testing.assert_close(found[: len(expected)], expected, rtol=0, atol=1e-4)


def test_an_adapter_that_waits_for_its_tokens_is_refused():
    with pytest.raises(TypeError, match="policy_model: its adapter is an activated LoRA"):
        ppo_of(adapted(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("xglm", {"d_model": 32, "ffn_dim": 48, "attention_heads": 4, "num_layers": 2}),
        ("minimax", {"num_key_value_heads": 2, "intermediate_size": 48, "block_size": 8}),
    ],
)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_float32_buffers_beside_weights_in_bfloat16(family, options, stored):
    ppo = ppo_of(model_of(family, **options).to(stored), compute_dtype="bfloat16")
    assert ppo.step(PROMPTS).metrics["first_max_log_ratio"] < 0.1
    own = own_cache(ppo.policy)
    assert own is None or own.why_no_cache is None
