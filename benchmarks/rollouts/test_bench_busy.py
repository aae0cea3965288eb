"""Decoding on a machine that other processes use as well: each keeps one core busy.

If there is one process more than cores, ours gets about half of one core.
"""

import subprocess
import sys
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import torch
from test_bench_rollout import sides
from transformers import AutoConfig, AutoModelForCausalLM

from ppo_fast.models.language_model import LanguageModel

ROWS, NEW_TOKENS, ROUNDS = 32, 24, 5
SIZES = {
    "num_hidden_layers": 12,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 8192,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES)
    return LanguageModel(AutoModelForCausalLM.from_config(config).eval())


@contextmanager
def busy_process():
    process = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("processes", "where"),
    [(0, "alone"), (1, "beside one busy process"), (2, "beside two busy processes")],
)
def test_decode(turns, llama, processes, where):
    prompts = [[(7 * row + i) % 1000 for i in range(8 + row % 5)] for row in range(ROWS)]
    both = sides((llama, SimpleNamespace(pad_token_id=0)), prompts, [NEW_TOKENS] * ROWS)
    work = f"decoding, {ROWS} rows x {NEW_TOKENS} tokens, {where}"
    with ExitStack() as others:
        for _ in range(processes):
            others.enter_context(busy_process())
        turns(work, both, rounds=ROUNDS, warm=False)
