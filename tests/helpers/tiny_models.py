"""Tiny tokenizers and randomly initialised transformers models for the tests: no download."""

from __future__ import annotations

from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

Family = Literal["llama", "gpt2", "qwen2", "gemma2", "gpt_neox", "cohere"]
FAMILIES: tuple[Family, ...] = ("llama", "gpt2", "qwen2", "gemma2", "gpt_neox", "cohere")

# 256 bytes, two special tokens and 49 merges; odd, so that every other row of logits is misaligned.
VOCAB_SIZE = 307
EOS, PAD = "<|end|>", "<|pad|>"
EOS_ID, PAD_ID = 0, 1
MAX_POSITIONS = 128

_SENTENCES = [
    "The film was over before the rain had stopped.",
    "The waiter brought the bread, and then he brought the other bread.",
    "There were three songs that the band had never played there before.",
    "She thought the phone would last another year, but the other one did not.",
    "Nothing in this room was where the other guests had thought it was.",
    "The train to the north is there; the other train is not.",
]


def tiny_tokenizer(*, pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 307 tokens that encodes any text and decodes it unchanged.

    ``eos`` is token 0. ``pad`` is token 1, or token 0 as well with ``pad_is_eos``; token 1 is then
    in no ordinary text, though a model may sample it. Encoding adds no special tokens, and padding
    goes to the left.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[EOS, PAD],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS if pad_is_eos else PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


# Settings of a gemma4_text, whose layers have heads of different sizes.
GEMMA_4 = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "intermediate_size": 96,
    "hidden_size_per_layer_input": 0,
    "vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
}


def tiny_config(
    family: Family,
    *,
    vocab_size: int = VOCAB_SIZE,
    layers: int = 2,
    hidden: int = 64,
    pad_token_id: int | None = None,
) -> PreTrainedConfig:
    """Return the family's config (dropout, tied or untied embeddings, softcaps) with tiny sizes.

    No ``pad_token_id`` unless asked for: it makes that row of the embedding zero, which would hide
    leaks from the padding.
    """
    if family == "gpt2":
        sizes = {"n_embd": hidden, "n_layer": layers, "n_head": 4, "n_inner": 2 * hidden + 3}
        sizes["n_positions"] = MAX_POSITIONS
    else:
        sizes = {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "intermediate_size": 2 * hidden + 3,
            "max_position_embeddings": MAX_POSITIONS,
        }
    # Grouped queries; Qwen2 has one key-value head, so that the tests have both counts.
    key_value_heads = {"llama": 2, "qwen2": 1, "gemma2": 2, "cohere": 4}
    if family in key_value_heads:
        sizes["num_key_value_heads"] = key_value_heads[family]
    if family == "gemma2":
        sizes |= {"head_dim": hidden // 4, "query_pre_attn_scalar": hidden // 4}
    if family == "cohere":
        sizes["logit_scale"] = 0.75  # its usual 1/16 makes logits flat at this width
    return AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        # The usual 0.02 makes logits nearly flat at this width; this, a deviation near 1.
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=pad_token_id,
        **sizes,
    )


def tiny_model(
    family: Family = "llama",
    *,
    vocab_size: int = VOCAB_SIZE,
    layers: int = 2,
    hidden: int = 64,
    seed: int = 0,
) -> PreTrainedModel:
    """Return a random causal language model in float32 and eval mode; ``seed`` gives its weights.

    ``hidden`` is a multiple of 8 (4 heads of even width). The global random state is left alone.
    """
    config = tiny_config(family, vocab_size=vocab_size, layers=layers, hidden=hidden)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny_classifier(
    family: Family = "llama",
    *,
    vocab_size: int = VOCAB_SIZE,
    layers: int = 2,
    hidden: int = 64,
    pad_token_id: int = PAD_ID,
    seed: int = 0,
) -> PreTrainedModel:
    """Return a random sequence classifier with one label, as reward models are, in eval mode.

    Cohere has no sequence classifier in transformers.
    """
    config = tiny_config(
        family, vocab_size=vocab_size, layers=layers, hidden=hidden, pad_token_id=pad_token_id
    )
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
