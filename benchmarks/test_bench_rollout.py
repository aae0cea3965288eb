"""Decoding SmolLM2-135M: ours against transformers `generate`, the same prompts, 24 new tokens.

Both sides sample at temperature 1 without truncation and never stop at EOS, so that both make the
same number of tokens. Every round times both, and the median is over rounds.
"""

import statistics
import time

import pytest
import torch

from ppo_fast.demo_task import load_prompts
from ppo_fast.language_model import LanguageModel
from ppo_fast.rollout import Sampling, decode

NEW_TOKENS, ROUNDS = 24, 3


@pytest.fixture(scope="module")
def smollm2():
    smollm2 = pytest.importorskip("ppo_fast.smollm2")
    return smollm2.load_smollm2()


@pytest.mark.parametrize("batch", [4, 16, 32])
def test_decode(benchmark, smollm2, batch, capsys):
    model, tokenizer = smollm2
    prompts = load_prompts()[0][:batch]
    ids = tokenizer(prompts)["input_ids"]
    padded = tokenizer(prompts, padding=True, return_tensors="pt")
    language_model = LanguageModel(model)
    theirs = []

    def generate():
        started = time.perf_counter()
        model.generate(
            **padded,
            do_sample=True,
            top_k=0,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        )
        theirs.append(time.perf_counter() - started)

    def ours():
        decode(
            language_model,
            ids,
            Sampling(NEW_TOKENS),
            seeds=torch.arange(batch),
            eos_ids=[],
            pad_id=tokenizer.pad_token_id,
        )

    generate()
    theirs.clear()
    benchmark.group = f"decode batch {batch}, {NEW_TOKENS} new tokens"
    # the set-up runs before every round and is not timed: the two sides take turns
    benchmark.pedantic(ours, setup=generate, rounds=ROUNDS, warmup_rounds=1)
    mine, other = benchmark.stats.stats.median, statistics.median(theirs[-ROUNDS:])
    tokens = batch * NEW_TOKENS
    benchmark.extra_info |= {"ours_tok_s": tokens / mine, "generate_tok_s": tokens / other}
    with capsys.disabled():
        print(
            f"\nbatch {batch}: {tokens / mine:.0f} tokens/s, transformers generate "
            f"{tokens / other:.0f} tokens/s, {other / mine:.2f}x"
        )
