"""Decoding SmolLM2-135M, and a GPT-2 of 124M random weights: ours against transformers `generate`,
on the same prompts and model.

Both sides sample at temperature 1 without truncation and never stop at EOS. Every round times both,
and the median is over rounds.
"""

import importlib
import random
import time
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from plain_ppo import generate
from transformers import GPT2Config, GPT2LMHeadModel

from ppo_fast.demo.task import load_prompts
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.precision import WeightCopies
from ppo_fast.rollout import Sampling, decode
from ppo_fast.rollout.slots import SlotCache, step_arguments
from ppo_fast.rollout.speedups.few_rows import few_row_products
from ppo_fast.rollout.speedups.fused_layers import fused_layers

ROUNDS = 3


@pytest.fixture(scope="module")
def smollm2():
    smollm2 = pytest.importorskip("ppo_fast.demo.smollm2")
    model, tokenizer = smollm2.load_smollm2()
    return LanguageModel(model), tokenizer


@pytest.fixture(scope="module")
def gpt2():
    """Return a GPT-2 of the usual sizes; what it has learned does not change its speed."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    return LanguageModel(model), SimpleNamespace(pad_token_id=model.config.eos_token_id)


def sides(smollm2, prompts, max_lengths, **options):
    """Return ours, and `generate` on the left-padded batch up to the longest response.

    ``options`` are those of ``decode``.
    """
    model, tokenizer = smollm2
    width, pad_id = max(map(len, prompts)), tokenizer.pad_token_id
    ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    longest = max(max_lengths)

    def ours():
        seeds = torch.arange(len(prompts))
        settings = {"seeds": seeds, "eos_ids": [], "pad_id": pad_id, "max_lengths": max_lengths}
        decode(model, prompts, Sampling(longest), **settings, **options)

    theirs = partial(generate, model.model, ids, mask, longest)
    return {"ppo_fast": ours, "transformers generate": theirs}


def print_rates(capsys, tokens, medians):
    with capsys.disabled():
        print("  " + ", ".join(f"{name} {tokens / t:.0f} tokens/s" for name, t in medians.items()))


@pytest.mark.parametrize("batch", [4, 16, 32])
def test_decode(turns, smollm2, batch, capsys):
    prompts = smollm2[1](load_prompts()[0][:batch])["input_ids"]
    work = f"decoding SmolLM2-135M, batch {batch}, 64 new tokens each"
    medians = turns(work, sides(smollm2, prompts, [64] * batch), rounds=ROUNDS, warm=False)
    print_rates(capsys, batch * 64, medians)


@pytest.mark.parametrize("batch", [4, 16])
def test_decode_gpt2(turns, gpt2, batch, capsys):
    draw = random.Random(0)
    prompts = [[draw.randrange(50000) for _ in range(32)] for _ in range(batch)]
    work = f"decoding GPT-2 124M, batch {batch}, 48 new tokens each"
    medians = turns(work, sides(gpt2, prompts, [48] * batch), rounds=ROUNDS, warm=False)
    print_rates(capsys, batch * 48, medians)


@pytest.mark.parametrize("batch", [4, 32])
def test_decode_in_bfloat16(turns, smollm2, batch, capsys):
    """Both are ours, on the same weights; copies in bfloat16 are made before."""
    model, tokenizer = smollm2
    prompts = tokenizer(load_prompts()[0][:batch])["input_ids"]
    lengths = [64] * batch
    half = LanguageModel(model.model, compute_dtype=torch.bfloat16)
    copies = WeightCopies(torch.bfloat16, kept_bytes=2**30)
    in_float32 = sides(smollm2, prompts, lengths)["ppo_fast"]
    in_half = sides((half, tokenizer), prompts, lengths)["ppo_fast"]

    def in_bfloat16():
        with copies.in_use(model.model):
            in_half()

    work = f"decoding SmolLM2-135M in bfloat16, batch {batch}, 64 new tokens each"
    both = {"ppo_fast": in_bfloat16, "ours in float32": in_float32}
    medians = turns(work, both, rounds=ROUNDS, warm=False)
    print_rates(capsys, batch * 64, medians)


@pytest.mark.parametrize("batch", [4, 32])
def test_decode_in_int8(turns, smollm2, batch, capsys):
    """Both are ours; the copies in int8 are made anew each time, as for each rollout."""
    prompts = smollm2[1](load_prompts()[0][:batch])["input_ids"]
    in_float32 = sides(smollm2, prompts, [64] * batch)["ppo_fast"]
    in_int8 = sides(smollm2, prompts, [64] * batch, int8=True)["ppo_fast"]
    work = f"decoding SmolLM2-135M with weights in int8, batch {batch}, 64 new tokens each"
    both = {"ppo_fast": in_int8, "ours in float32": in_float32}
    medians = turns(work, both, rounds=ROUNDS, warm=False)
    print_rates(capsys, batch * 64, medians)


def test_skewed_lengths(turns, smollm2, capsys):
    prompts = smollm2[1](load_prompts()[0][:32])["input_ids"]
    draw = random.Random(0)
    lengths = [draw.randint(8, 128) for _ in prompts]
    work = "decoding SmolLM2-135M, 32 responses of 8 to 128 tokens"
    medians = turns(work, sides(smollm2, prompts, lengths), rounds=ROUNDS, warm=False)
    print_rates(capsys, sum(lengths), medians)


def test_samples_of_a_prompt(turns, smollm2, capsys):
    draw = random.Random(0)
    prompts = [[draw.randrange(1000, 40000) for _ in range(256)] for _ in range(4)]
    prompts = [prompt for prompt in prompts for _ in range(8)]
    work = "decoding SmolLM2-135M, 8 samples of each of 4 prompts of 256 tokens, 32 new tokens"
    medians = turns(work, sides(smollm2, prompts, [32] * 32), rounds=ROUNDS, warm=False)
    print_rates(capsys, 32 * 32, medians)


@torch.no_grad()
def steps_after(model, dtype, *, rows, prompt, new):
    """Return a side: ``new`` steps of ``rows`` sequences, whose cache holds ``prompt`` tokens."""
    config, numbers = model.text_config, torch.zeros(rows, dtype=torch.int64)
    cache = SlotCache(config, rows, prompt + new, dtype=dtype)
    states = torch.randn(1, config.num_key_value_heads, prompt, config.head_dim)
    cache.fill([(states, states)] * len(cache.layers), numbers, torch.arange(rows))

    @torch.no_grad()
    def run():
        with fused_layers(model) as layers, few_row_products(model.model):
            assert len(layers) == config.num_hidden_layers
            for t in range(prompt, prompt + new):
                model.next(**step_arguments(model, cache, numbers + 11, numbers + t, t + 1))

    return run


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_cache_in_bfloat16(turns, smollm2, weights, capsys):
    model, shape = smollm2[0], {"rows": 16, "prompt": 1500, "new": 32}
    both = {
        "ppo_fast: keys and values in bfloat16": steps_after(model, torch.bfloat16, **shape),
        "ours: in float32": steps_after(model, None, **shape),
    }
    work = f"decoding SmolLM2-135M, weights in {weights}, 16 rows after 1,500 tokens, 32 new tokens"
    with WeightCopies(torch.bfloat16 if weights == "bfloat16" else None).in_use(model.model):
        medians = turns(work, both, rounds=ROUNDS, warm=False)
    print_rates(capsys, 16 * 32, medians)


@pytest.mark.parametrize("batch", [4, 16, 32])
def test_where_a_step_goes(benchmark, smollm2, batch, capsys, monkeypatch):
    """Time layers, head and drawing inside a run.

    The rest is embedding, rotary tables, masks and Python. Weights are read once a step and
    multiplied with every row.
    """
    from ppo_fast.models import language_model
    from ppo_fast.rollout.speedups import fused_layers

    spent: Counter[str] = Counter()

    def timed(part, call):
        def run(*args, **kwargs):
            started = time.perf_counter()
            result = call(*args, **kwargs)
            spent[part] += time.perf_counter() - started
            return result

        return run

    model, tokenizer = smollm2
    prompts = tokenizer(load_prompts()[0][:batch])["input_ids"]
    ours = sides(smollm2, prompts, [64] * batch)["ppo_fast"]
    layer = fused_layers.StepForward
    monkeypatch.setattr(layer, "__call__", timed("layers", layer.__call__))
    monkeypatch.setattr(
        language_model, "few_row_linear", timed("head", language_model.few_row_linear)
    )
    drawing = importlib.import_module("ppo_fast.rollout.draw")
    monkeypatch.setattr(drawing, "sample_tokens", timed("drawing", drawing.sample_tokens))
    decoding = importlib.import_module("ppo_fast.rollout.by_slots")
    step = decoding._Decoding.step
    steps = []

    def timed_step(self):
        before = Counter(spent)
        started = time.perf_counter()
        step(self)
        steps.append({"all": time.perf_counter() - started} | (spent - before))

    monkeypatch.setattr(decoding._Decoding, "step", timed_step)
    benchmark.pedantic(ours, rounds=1, warmup_rounds=1)
    middle = {k: sorted(s.get(k, 0.0) for s in steps)[len(steps) // 2] for k in steps[0]}
    middle["rest"] = middle["all"] - sum(middle[k] for k in ("layers", "head", "drawing"))
    head = model.head.weight.numel()
    weights = {"layers": sum(p.numel() for p in model.model.parameters()) - head, "head": head}
    work = f"a decoding step of SmolLM2-135M, batch {batch}"
    names = {"all": "ppo_fast: the step"}
    for part in ("layers", "head", "drawing", "rest"):
        names[part] = f"ppo_fast: {part}"
        if part in weights:
            rate = 2 * weights[part] * batch / middle[part] / 1e9
            bandwidth = 4 * weights[part] / middle[part] / 1e9
            names[part] += f", {rate:.0f} GFLOP/s, {bandwidth:.1f} GB/s of weights"
    benchmark.extra_info |= {"work": work, "unit": "ms", "rounds": 1}
    benchmark.extra_info["sides"] = {name: 1e3 * middle[part] for part, name in names.items()}
    with capsys.disabled():
        print(f"\n{work}")
        for name, amount in benchmark.extra_info["sides"].items():
            print(f"  {amount:8.2f} ms  {name}")
