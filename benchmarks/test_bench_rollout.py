"""Decoding SmolLM2-135M: ours against transformers `generate`, the same prompts, 24 new tokens.

Both sides sample at temperature 1 without truncation and never stop at EOS, so that both make the
same number of tokens. Every round times both, and the median is over rounds.
"""

import pytest
import torch

from ppo_fast.demo_task import load_prompts
from ppo_fast.language_model import LanguageModel
from ppo_fast.rollout import Sampling, decode

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def smollm2():
    smollm2 = pytest.importorskip("ppo_fast.smollm2")
    return smollm2.load_smollm2()


@pytest.mark.parametrize("batch", [4, 16, 32])
def test_decode(turns, smollm2, batch, capsys):
    model, tokenizer = smollm2
    prompts = load_prompts()[0][:batch]
    ids = tokenizer(prompts)["input_ids"]
    padded = tokenizer(prompts, padding=True, return_tensors="pt")
    language_model = LanguageModel(model)

    def generate():
        model.generate(
            **padded,
            do_sample=True,
            top_k=0,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        )

    def ours():
        decode(
            language_model,
            ids,
            Sampling(NEW_TOKENS),
            seeds=torch.arange(batch),
            eos_ids=[],
            pad_id=tokenizer.pad_token_id,
        )

    sides = {"ppo_fast": ours, "transformers generate": generate}
    work = f"decoding SmolLM2-135M, batch {batch}, {NEW_TOKENS} new tokens each"
    medians = turns(work, sides, rounds=3, warm=False)
    with capsys.disabled():
        rates = [f"{batch * NEW_TOKENS / t:.0f} tokens/s" for t in medians.values()]
        print("  " + ", transformers generate ".join(rates))
