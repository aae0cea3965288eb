"""Tiny configurations of every type of causal language model that transformers has.

A type's own configuration class says which sizes it has; those named in ``SIZES`` are set to small
numbers. ``OVERRIDES`` has what that rule does not get right.
"""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from tiny_models import EOS_ID, MAX_POSITIONS, PAD_ID, VOCAB_SIZE
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LAYERS = 3
TOWER_LAYERS = 2  # of parts for images and sound, which have other numbers in real models too


class Case(NamedTuple):
    """A tiny model of a type.

    name: the type, or "type+variant".
    model_type: as in transformers.
    changes: arguments of its configuration, beside those of the type.
    train_mode: whether the model is handed over in train mode, where routers add noise.
    short: whether its rows have at most 12 tokens, within what its positions allow.
    """

    name: str
    model_type: str
    changes: dict[str, Any]
    train_mode: bool = False
    short: bool = False


def names(value: Any, words: str) -> dict[str, Any]:
    """Return the same value for each of the names in ``words``."""
    return dict.fromkeys(words.split(), value)


# Attributes set to the number of layers.
LAYER_COUNTS = {
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"),
    *("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"),
}
# Set wherever a configuration has the attribute. Heads of 16, so that 4 of them make 64.
SIZES: dict[str, Any] = {
    **names(VOCAB_SIZE, "vocab_size decoder_vocab_size vocab_size_per_layer_input"),
    # No pad token: its row of the embedding would be zero, which would hide leaks from the padding.
    **names(None, "bos_token_id pad_token_id"),
    "eos_token_id": EOS_ID,
    # The usual 0.02 makes logits nearly flat at this width; this, a deviation near 1.
    **names(0.15, "initializer_range init_std embed_init_std initializer_factor"),
    **names(
        MAX_POSITIONS,
        "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length "
        "max_target_positions",
    ),
    **names(64, "hidden_size d_model n_embd emb_dim dim_model"),
    **names(
        4,
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
        "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
        "linear_num_value_heads linear_num_heads swa_num_attention_heads",
    ),
    **names(2, "num_key_value_heads linear_num_key_heads swa_num_key_value_heads kv_n_heads"),
    **names(
        16,
        "head_dim kv_channels dim_head d_head swa_head_dim attention_head_size global_head_dim "
        "linear_key_head_dim linear_value_head_dim linear_head_dim v_head_dim qk_head_dim",
    ),
    **names(8, "qk_rope_head_dim qk_nope_head_dim rotary_dim"),
    **names(
        96,
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner dff dim_ff "
        "intermediate_size_mlp dense_intermediate_size ffn_hidden_size",
    ),
    **names(
        48,
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
        "moe_shared_expert_intermediate_size expert_ffn_hidden_size "
        "shared_experts_intermediate_size prefix_dense_intermediate_size router_hidden_size",
    ),
    **names(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **names(2, "num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k"),
    **names(
        8,
        "mamba_d_state state_size ssm_state_size mamba_n_heads mamba_num_heads mamba_chunk_size "
        "chunk_size hidden_size_per_layer_input",
    ),
    **names(1, "n_groups mamba_ngroups mamba_n_groups"),
    # Of parts for images and sound, which the tests never reach.
    **names(32, "image_size"),
    **names(8, "patch_size"),
}
# Set where the attribute is not None by default.
SIZES_IF_ANY: dict[str, Any] = {
    **names(24, "q_lora_rank kv_lora_rank o_lora_rank"),
    **names(1, "n_group topk_group num_expert_group first_k_dense_replace num_dense_layers"),
    **names(1, "n_shared_experts num_shared_experts moe_num_shared_experts"),
    # Below the lengths of the tests' sequences.
    **names(
        6,
        "sliding_window sliding_window_size attention_window_size local_attention "
        "attention_chunk_size keep_window_size local_attention_window_len",
    ),
    **names(4, "window_size index_topk log_scaling_n_floor floor_scale rel_extent"),
    **names(16, "index_n_heads"),  # so many that scores are hardly ever tied
    **names(8, "index_head_dim"),
}
# Types of layers, one an entry. A tiny model has every type that the usual size has.
LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type")

# Types by why their usual settings do not do.
_PAD = {"pad_token_id": PAD_ID}  # positions are counted from it, or it must not be None
_MULTI_HEAD = {"num_key_value_heads": 4}  # latent attention: as many keys as queries
_GRANITE = {
    "embedding_multiplier": 2.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}
_NOT_FLAT = {"logit_scale": 0.75}  # its usual 1/16 makes logits flat at this width

OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": _MULTI_HEAD,
    "axk2": _MULTI_HEAD,
    "bamba": {"attn_layer_indices": [1]},  # without it there is no attention at all
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "camembert": _PAD,
    "cohere": _NOT_FLAT,
    "cohere2": _NOT_FLAT,
    "cohere2_moe": _NOT_FLAT,
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
            }
        }
    },
    "cpmant": {"position_bias_num_buckets": 32, "prompt_length": 4},
    "cwm": {"bos_token_id": 2},
    "data2vec-text": _PAD,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 2.0}},  # there is no default
    "deepseek_v2": _MULTI_HEAD,
    "deepseek_v3": _MULTI_HEAD,
    "deepseek_v32": _MULTI_HEAD,
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "o_groups": 2,
        "num_key_value_heads": 1,
    },
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "dots1": {"n_shared_experts": 1},  # None by default, which it cannot do with
    "dots3_note": {
        "vision_config": {
            **names(64, "adapter_in_dim adapter_out_dim"),
            "mlp_layer_types": ["dense", "sparse"],
        },
        "audio_config": names(64, "adapter_input_size adapter_out_dim"),
    },
    "dots3_note_text": {
        **_MULTI_HEAD,  # with sizes of their own for layers with a window
        **names(4, "swa_num_attention_heads swa_num_key_value_heads"),
        **names(24, "swa_q_lora_rank swa_kv_lora_rank"),
        **names(16, "swa_head_dim swa_v_head_dim"),
        **names(8, "swa_qk_nope_head_dim"),
    },
    "electra": {"embedding_size": 32},
    "emu3": {"text_config": {**_PAD, "bos_token_id": 2}},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "laurel_rank": 8},
    "gemma4": {"text_config": _PAD},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "gemma4_unified": {"text_config": _PAD},
    "glm4_moe_lite": _MULTI_HEAD,
    "glm_moe_dsa": _MULTI_HEAD,
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "granite": _GRANITE,
    "granite_swa": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoe_swa": _GRANITE,
    "granitemoehybrid": {
        **_GRANITE,  # without these types there is no attention at all
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "granitemoeshared": _GRANITE,
    "hrm_text": {"H_cycles": 2, "L_cycles": 1, "L_bp_cycles": [1]},
    "inkling2_loop_text": {
        "unpadded_vocab_size": VOCAB_SIZE,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "n_layers_per_attn_res_block": 1,
        "loop_gate_rank": 8,
    },
    "inkling2_text": {"unpadded_vocab_size": VOCAB_SIZE, "n_layers_per_attn_res_block": 2},
    "inkling_text": {"logits_mup_width_multiplier": 1.5},  # its usual 24 makes logits flat
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {"no_rope_layers": [1, 0, 1]},  # by it, layers attend to all or to a chunk
    "longcat_flash": {**_MULTI_HEAD, "zero_expert_num": 2, "head_dim": 8},
    "mamba2": {"num_heads": 8},  # times the head size it is twice the hidden size
    "minicpm3": {**_MULTI_HEAD, "dim_model_base": 64},  # its usual 256 makes logits steep
    "minimax_m3_vl_text": {"index_n_heads": 2},  # as many as keys
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 4,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,  # scales attention from position 4 on
        }
    },
    "mllama": {"text_config": {"bos_token_id": 2, "cross_attention_layers": [1]}},
    "modernbert-decoder": {
        **_PAD,
        **names(2, "bos_token_id cls_token_id sep_token_id"),  # must not be None
    },
    "prophetnet": _PAD,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 50,
        "heads_per_ngram": 2,
        "make_ngram_vocab_size_divisible_by": 1,
        "split_ngram_parts": 1,
    },
    "reformer": {
        **_PAD,
        "attn_layers": ["local", "lsh", "local"],
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 48],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "hash_seed": 0,
        "feed_forward_size": 96,
    },
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 48},
    "roberta": _PAD,
    "roberta-prelayernorm": _PAD,
    "roc_bert": {
        **names(8, "shape_vocab_size pronunciation_vocab_size"),
        **names(16, "shape_embed_dim pronunciation_embed_dim"),
    },
    "sarvam_mla": _MULTI_HEAD,
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "whisper": {"max_source_positions": 16},
    "xlm": {**_PAD, "causal": True},  # an encoder without it
    "xlm-roberta": _PAD,
    "xlm-roberta-xl": _PAD,
    "xlstm": {"qk_dim_factor": 1.0},  # sizes are rounded up to multiples of 64
    "xmod": {**_PAD, "default_language": "en_XX"},
    "youtu": _MULTI_HEAD,
    "zamba": {
        "num_hidden_layers": 4,  # two shared layers, so that there is something to share
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_model(case: Case) -> PreTrainedModel:
    """Return the case's model, random and in float32; equal calls give equal weights.

    One token in twelve ends a response, so that lengths differ.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(case), dtype=torch.float32)
        for parameter in model.parameters():
            # norms of 1 and biases of 0 would hide that a weight is not used
            if parameter.is_floating_point() and bool((parameter == parameter.flatten()[0]).all()):
                parameter.data += 0.1 * torch.randn_like(parameter)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = list(range(0, VOCAB_SIZE, 12))
    return model.train(case.train_mode)


def tiny_config(case: Case) -> PreTrainedConfig:
    """Return the case's configuration, with tiny sizes."""
    config_class = CONFIG_MAPPING[case.model_type]
    arguments = _small(_usual(config_class))
    _merge(arguments, case.changes)
    return config_class(**arguments)


def _usual(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Return a configuration of the usual size."""
    try:
        return config_class()
    except StrictDataclassClassValidationError:  # its own defaults do not fit one another
        return config_class(**OVERRIDES[config_class.model_type])


def _small(usual: PreTrainedConfig, layers: int = LAYERS) -> dict[str, Any]:
    """Return the arguments of a tiny configuration like ``usual``, its parts included."""
    small: dict[str, Any] = {}
    for field in dataclasses.fields(usual):
        if field.name in LAYER_COUNTS:
            small[field.name] = layers
        elif field.name in SIZES:
            small[field.name] = SIZES[field.name]
        elif field.name in SIZES_IF_ANY and field.default is not None:
            small[field.name] = SIZES_IF_ANY[field.name]
        elif field.name == "is_decoder":
            small[field.name] = True  # without it BERT and its kin attend to later tokens
    for name in getattr(usual, "sub_configs", {}):
        if (part := getattr(usual, name, None)) is not None:
            is_tower = name.startswith(("vision", "audio", "vq"))
            small[name] = _small(part, TOWER_LAYERS if is_tower else LAYERS)
    _merge(small, OVERRIDES.get(usual.model_type, {}))
    return _layer_lists(usual, small.get("num_hidden_layers", layers)) | small


def _layer_lists(usual: PreTrainedConfig, count: int) -> dict[str, list[str]]:
    """Return ``count`` types of layers that have every type that ``usual`` has."""
    lists = {}
    for name in {field.name for field in dataclasses.fields(usual)} & set(LAYER_LISTS):
        if types := list(dict.fromkeys(getattr(usual, name) or ())):
            lists[name] = [types[i % len(types)] for i in range(max(count, len(types)))]
    return lists


def _merge(arguments: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put ``changes`` into ``arguments``, into those of its parts too."""
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(arguments.get(name), dict):
            _merge(arguments[name], value)
        else:
            arguments[name] = deepcopy(value)
