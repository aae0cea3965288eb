"""Compute what a decoding step on a GPU launches and reads, and the least time of each.

Kernels are launched from Python. They are counted on the CPU, in a recording of a step of a model
with as many layers, but narrow ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from recorded_ops import RecordedOps, as_on_a_gpu
from transformers import AutoConfig, AutoModelForCausalLM

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.rollout import Sampling, decode

LAUNCH_US = 5.0
"""Microseconds to launch a kernel from Python: gpu_report.CAVEAT."""
ROWS, TOKENS = 32, 512
"""Rows in the table, and tokens of each in the cache."""

# As published in the models' config.json, in bfloat16.
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-1.5B": {
        "model_type": "qwen2",
        "num_hidden_layers": 28,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


class DecodingStep(NamedTuple):
    model: str
    launches: int
    weight_bytes: int
    cache_bytes: int
    """Keys and values of ROWS rows of TOKENS tokens."""

    @property
    def launch_ms(self) -> float:
        return self.launches * LAUNCH_US / 1e3

    def bytes_ms(self, bandwidth: float) -> float:
        """Return the milliseconds to read weights and cache; ``bandwidth`` in GB/s."""
        return (self.weight_bytes + self.cache_bytes) / bandwidth / 1e6


def steps() -> list[DecodingStep]:
    return [
        DecodingStep(name, launches(settings), weight_bytes(settings), cache_bytes(settings))
        for name, settings in MODELS.items()
    ]


def as_lines(bandwidths: dict[str, float]) -> list[dict[str, Any]]:
    """Return the steps as lines of the report; ``bandwidths`` in GB/s by name of the GPU."""
    lines = []
    for step in steps():
        read = {gpu: float(f"{step.bytes_ms(rate):.4g}") for gpu, rate in bandwidths.items()}
        lines.append(step._asdict() | {"launch_ms": step.launch_ms, "bytes_ms": read})
    return lines


def launches(settings: dict[str, Any]) -> int:
    """Count the launches of one step of the model, including the drawing of tokens."""
    heads, groups = settings["num_attention_heads"], settings["num_key_value_heads"]
    thin = {"hidden_size": 8 * heads // groups, "num_attention_heads": heads // groups}
    thin |= {"num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": 64}
    config = AutoConfig.for_model(**(settings | thin))
    model = LanguageModel(AutoModelForCausalLM.from_config(config).eval())
    counts = []

    def capture(step: Any) -> Any:
        with RecordedOps() as ops:
            step()
        counts.append(ops.launches)
        return ops.replay

    seeds, sampling = torch.arange(4), Sampling(4)
    with as_on_a_gpu():
        decode(model, [[1, 2]] * 4, sampling, seeds=seeds, eos_ids=[], pad_id=0, capture=capture)
    (count,) = counts
    return count


def weight_bytes(settings: dict[str, Any]) -> int:
    """Return the bytes of weights read, in bfloat16; an untied embedding is only looked up."""
    config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = {id(weight): weight for weight in model.parameters()}
    if not config.tie_word_embeddings:
        del weights[id(model.get_input_embeddings().weight)]
    return 2 * sum(weight.numel() for weight in weights.values())


def cache_bytes(settings: dict[str, Any]) -> int:
    head = settings["hidden_size"] // settings["num_attention_heads"]
    per_token = 2 * settings["num_hidden_layers"] * settings["num_key_value_heads"] * head
    return 2 * per_token * ROWS * TOKENS
