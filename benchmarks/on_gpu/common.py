"""What the stages share: findings as JSON lines, random models, and a clock."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

RESULTS = Path(os.environ.get("ON_GPU_RESULTS", "results.jsonl"))
STARTED = time.perf_counter()

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "SmolLM2-135M": {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "Llama-1B": {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def parser() -> argparse.ArgumentParser:
    """Return a parser with ``--cpu``, the dry run that every stage has."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--cpu", action="store_true", help="a dry run, on tiny sizes")
    return arguments


ON_GPU = "--cpu" not in sys.argv
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def note(stage: str, **found: Any) -> None:
    """Write a finding: a line of the results file, and of the log."""
    at = round(time.perf_counter() - STARTED, 1)
    line = json.dumps({"stage": stage, "at": at, **found}, default=str)
    with RESULTS.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


@contextmanager
def attempt(stage: str) -> Iterator[None]:
    """Within the block, an error becomes a finding; the code after the block runs."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        note(stage, error=f"{type(error).__name__}: {error}"[:600])


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return how long ``run`` takes on the device, and its result."""
    synchronize()
    started = time.perf_counter()
    result = run()
    synchronize()
    return time.perf_counter() - started, result


def random_llama(name: str, dtype: torch.dtype) -> Any:
    """Make a Llama of size MODELS[name] with random weights and logits of deviation about 1."""
    config = AutoConfig.for_model(
        "llama",
        **MODELS[name],
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype=dtype,
    )
    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        # the usual 0.02 makes logits flat: all tokens would be about equally likely
        scale = 1.0 / (0.02 * MODELS[name]["hidden_size"] ** 0.5)
        model.get_input_embeddings().weight.data.mul_(scale)
    model.generation_config.eos_token_id = None
    return model


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer: token i is the word "w<i>"; 0 pads, 1 ends a response."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", eos_token="w1", padding_side="left"
    )
