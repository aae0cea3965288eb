"""Print which GPU can train a model of 0.5B to 8B: all its layers, top layers, or by LoRA."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from ppo_fast.config import PPOConfig
from ppo_fast.diagnostics.memory_plan import TOP, MemoryPlan, plan_memory
from ppo_fast.models.lora import lora_config

GPUS = (12, 24, 48, 80)
"""Sizes of GPUs' memory in GB."""
OFFLOAD = ("optimizer", "reference", "reward")

SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "1.5B": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "3B": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "8B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
"""Shapes of Qwen2.5 (0.5B, 1.5B, 3B) and of Llama 3 (8B)."""


class Way(NamedTuple):
    """A way to train a model of a size, planned without offload."""

    size: str
    name: str
    plan: MemoryPlan


def what_fits(
    config: PPOConfig, *, batch_size: int, prompt_length: int, lora_rank: int = 16
) -> Iterator[Way]:
    """Plan QLoRA, LoRA, top layers and all layers, each with a value head, for models of each size.

    Models are stored in bfloat16. Ways with LoRA are planned where peft is installed.

    Args:
        config: settings of the training; its critic, layers and offload are replaced.
        batch_size: prompts per step.
        prompt_length: max tokens of a prompt.
        lora_rank: rank of the adapters.
    """
    for size, shape in SHAPES.items():
        settings = dict(shape)
        model_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        model_config.dtype = torch.bfloat16
        for name, k, adapter, quantization in _ways(model_config, lora_rank):
            yield Way(
                size,
                name,
                plan_memory(
                    model_config,
                    replace(
                        config, critic="head", value_frozen=(), num_layers_unfrozen=k, offload=()
                    ),
                    batch_size=batch_size,
                    prompt_length=prompt_length,
                    adapter=adapter,
                    quantization=quantization,
                ),
            )


def _ways(model_config: Any, rank: int) -> Iterator[tuple[str, int | None, Any, Any]]:
    """Yield names of ways, their numbers of top layers, adapters and bits."""
    if importlib.util.find_spec("peft"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
        adapter = lora_config(model, rank)
        yield f"QLoRA of rank {rank}, 4 bits", None, adapter, "4bit"
        yield f"LoRA of rank {rank}", None, adapter, None
    yield f"{TOP} top layers", TOP, None, None
    yield "all layers", None, None, None


def show_what_fits(console: Console, ways: Iterator[Way]) -> None:
    """Print a table with a row per way: the peaks with their margins, and where they fit."""
    table = Table(title="peak in GB with a margin of 10%, and the smallest GPU that has it")
    table.add_column("model")
    for name in ("way", "peak", "fits", "with offload", "fits", "then in host memory"):
        table.add_column(name, justify="left" if name == "way" else "right")
    before = None
    for size, name, plan in ways:
        if before not in (None, size):
            table.add_section()
        before, resting = size, replace(plan, offload=OFFLOAD)
        table.add_row(
            size,
            name,
            f"{plan.with_margin / 1e9:.1f}",
            smallest(plan),
            f"{resting.with_margin / 1e9:.1f}",
            smallest(resting),
            f"{resting.host / 1e9:.1f}",
        )
    console.print(table)


def smallest(plan: MemoryPlan) -> str:
    """Return the smallest of ``GPUS`` that a plan fits on, "-" if there is none."""
    return next((str(size) for size in GPUS if plan.with_margin <= size * 1e9), "-")
