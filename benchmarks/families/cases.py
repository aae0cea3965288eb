"""The cases: every type of causal language model, and variants of some."""

from __future__ import annotations

from typing import Any

from families.configs import TYPES, Case
from tiny_models import MAX_POSITIONS


def _variants(model_type: str, **changes: Any) -> list[Case]:
    return [Case(f"{model_type}+{name}", model_type, c) for name, c in changes.items()]


def _rope(rope_type: str, **more: Any) -> dict[str, Any]:
    """Return rope_parameters that change beyond 12 positions."""
    return {
        "rope_type": rope_type,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 12,
        **more,
    }


_LONG = {"short_factor": [1.0] * 8, "long_factor": [1.0 + i / 2 for i in range(8)]}
_MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_HALF_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_WINDOW = {"sliding_window": 4}

VARIANTS: list[Case] = [
    *_variants(
        "llama",
        tied={"tie_word_embeddings": True},
        biases={"attention_bias": True, "mlp_bias": True},
        eager={"attn_implementation": "eager"},
        dynamic={"rope_parameters": _rope("dynamic", factor=2.0)},
        linear={"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        llama3={
            "rope_parameters": _rope(
                "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0
            )
        },
        yarn={"rope_parameters": _rope("yarn", factor=4.0)},
        longrope={"rope_parameters": _rope("longrope", factor=4.0, **_LONG)},
    ),
    Case("llama+dropout_train", "llama", {"attention_dropout": 0.3}, train_mode=True),
    Case("gpt2+dropout_train", "gpt2", {}, train_mode=True),
    *_variants("mistral", no_window={"sliding_window": None}),
    *_variants("mixtral", window=_WINDOW),
    Case("mixtral+jitter", "mixtral", {"router_jitter_noise": 0.3}, train_mode=True),
    Case(
        "phimoe+jitter",
        "phimoe",
        {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3},
        train_mode=True,
    ),
    Case("dbrx+jitter", "dbrx", {"ffn_config": {"moe_jitter_eps": 0.3}}, train_mode=True),
    *_variants("qwen2", window={"use_sliding_window": True, **_WINDOW, **_MIXED}),
    *_variants("qwen2", tied={"tie_word_embeddings": True}),
    *_variants("qwen3", window={"use_sliding_window": True, **_WINDOW, **_MIXED}),
    *_variants("qwen2_moe", window={"use_sliding_window": True, **_WINDOW, **_MIXED}),
    *_variants("qwen3_moe", window={"use_sliding_window": True, **_WINDOW}),
    *_variants(
        "phi3",
        longrope={
            "original_max_position_embeddings": 12,
            "rope_parameters": _rope("longrope", **_LONG),
        },
        window=_WINDOW,
    ),
    *_variants(
        "phimoe",
        longrope={"rope_parameters": _rope("longrope", short_mscale=1.1, long_mscale=1.3, **_LONG)},
    ),
    *_variants("starcoder2", window=_WINDOW),
    *_variants("laguna", window={**_WINDOW, **_MIXED}),
    *_variants("mellum", window={**_WINDOW, **_MIXED}),
    *_variants(
        "zaya", window={**_WINDOW, "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"]}
    ),
    *_variants(
        "minimax_m3_vl_text",
        sparse={
            "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
            "index_block_size": 4,
            "index_topk_blocks": 2,
        },
    ),
    *_variants(
        "gemma4_text",
        moe={
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 48,
        },
        shared_keys={"num_hidden_layers": 4, "num_kv_shared_layers": 2, **_HALF_SLIDING},
        keys_are_values={"attention_k_eq_v": True},
    ),
    *_variants("gemma", untied={"tie_word_embeddings": False}),
    *_variants(
        "gemma3_text",
        softcaps={"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        bidirectional={"use_bidirectional_attention": True},
    ),
    *_variants("gpt2", inverse_layer={"scale_attn_by_inverse_layer_idx": True}),
    *_variants("gpt2", untied={"tie_word_embeddings": False}),
    *_variants("gpt_bigcode", multi_head={"multi_query": False}),
    *_variants(
        "gpt_neox",
        sequential={"use_parallel_residual": False},
        dynamic={
            "max_position_embeddings": 12,  # of transformers, this is what its angles depend on
            "rope_parameters": _rope("dynamic", factor=2.0),
        },
    ),
    *_variants(
        "falcon",
        alibi={"alibi": True},
        new_decoder={"new_decoder_architecture": True},
        sequential={"parallel_attn": False, "multi_query": False, "bias": True},
    ),
    *_variants("mpt", positions={"attn_config": {"alibi": False}}),
    *_variants(
        "opt",
        projected={"word_embed_proj_dim": 32},
        post_norm={"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    ),
    *_variants("moshi", wide_window={"sliding_window": MAX_POSITIONS}),
    *_variants("olmo", clipped={"clip_qkv": 0.5}),
    *_variants("phi", qk_norm={"qk_layernorm": True}),
    *_variants("stablelm", parallel={"use_parallel_residual": True, "qk_layernorm": True}),
    *_variants("deepseek_v2", no_q_lora={"q_lora_rank": None}),
    *_variants("bert", encoder={"is_decoder": False}),
    *_variants("roberta", encoder={"is_decoder": False}),
    *_variants("xlm", encoder={"causal": False}),
    *_variants("xlnet", uni={"attn_type": "uni"}),
]
# The same within the first 12 positions, and others whose numbers change beyond them.
_BY_NAME = {case.name: case for case in VARIANTS}
VARIANTS += [
    _BY_NAME[name]._replace(name=f"{name}_short", short=True)
    for name in ("llama+dynamic", "llama+longrope", "phi3+longrope", "phimoe+longrope")
]
VARIANTS += [
    Case("gpt_neo+window_short", "gpt_neo", {"window_size": 12}, short=True),
    Case("doge+window_short", "doge", {"keep_window_size": 12}, short=True),
    Case("deepseek_v32+topk_short", "deepseek_v32", {"index_topk": 12}, short=True),
]

CASES: dict[str, Case] = {
    case.name: case
    for case in sorted(
        [*(Case(t, t, {}) for t in TYPES), *VARIANTS], key=lambda case: (case.model_type, case.name)
    )
}
