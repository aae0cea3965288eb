"""Greedy decoding, token for token, against transformers ``generate``."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, MAX_POSITIONS, PAD_ID, VOCAB_SIZE, tiny_model

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.rollout import Sampling, decode

# Left padding of every width from 0 to 9, and prompts of one token.
PROMPTS = [[5, 61, 7, 300, 12, 8, 90, 17, 4, 2], [44], [3, 2, 91, 250], [90, 90, 90], [306] * 9]
PROMPTS += [[200 + i for i in range(n)] for n in (2, 5, 6, 7, 8)]
NEW_TOKENS = 12

each_family = pytest.mark.parametrize("family", FAMILIES)


def greedy(model, prompts, *, eos_ids=(), max_length=NEW_TOKENS, **options):
    rollout = decode(
        LanguageModel(model),
        prompts,
        Sampling(max_length, top_k=1),
        seeds=torch.arange(len(prompts)),
        eos_ids=list(eos_ids),
        pad_id=PAD_ID,
        **options,
    )
    tokens = rollout.tokens
    rows = zip(tokens.response_ids.tolist(), tokens.response_lengths.tolist(), strict=True)
    return [ids[:length] for ids, length in rows]


def generated(model, prompts, *, eos_ids=(), max_length=NEW_TOKENS):
    """Return what ``generate`` decodes from left-padded prompts, up to and with the first EOS."""
    if model.dtype == torch.float64 and model.config.model_type == "gemma2" and len(prompts) > 1:
        # its eager attention gives NaN for padded rows in float64
        return [generated(model, [p], eos_ids=eos_ids, max_length=max_length)[0] for p in prompts]
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD_ID] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max_length,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=PAD_ID,
    )
    rows = []
    for row in out[:, width:].tolist():
        ends = [i for i, token in enumerate(row) if token in eos_ids]
        rows.append(row[: ends[0] + 1] if ends else row)
    return rows


@each_family
@pytest.mark.parametrize("slots", [None, 3])
def test_in_float64_the_tokens_are_those_of_generate(family, slots):
    model = tiny_model(family, layers=3).double()
    assert greedy(model, PROMPTS, slots=slots) == generated(model, PROMPTS)


@each_family
def test_in_float32_too_up_to_a_near_tie(family):
    model = tiny_model(family, layers=3)
    exact = tiny_model(family, layers=3).double()
    for ours, theirs, prompt in zip(
        greedy(model, PROMPTS), generated(model, PROMPTS), PROMPTS, strict=True
    ):
        if ours == theirs:
            continue
        first = next(i for i in range(NEW_TOKENS) if ours[i] != theirs[i])
        logits = exact(torch.tensor([prompt + ours[:first]])).logits[0, -1]
        best, second = logits.topk(2).values.tolist()
        assert best - second < 1e-3


@each_family
def test_an_eos_ends_a_response_also_as_its_first_token(family):
    model = tiny_model(family).double()
    endless = generated(model, PROMPTS)
    # the first token of one response, and one from the middle of another
    eos_ids = {endless[0][0], endless[3][5]}
    found = greedy(model, PROMPTS, eos_ids=eos_ids)
    assert found == generated(model, PROMPTS, eos_ids=eos_ids)
    assert len(found[0]) == 1


@each_family
def test_a_prompt_that_all_but_fills_the_context(family):
    model = tiny_model(family).double()
    prompt = torch.randint(2, VOCAB_SIZE, (MAX_POSITIONS - 3,)).tolist()
    prompts = [prompt, [44]]
    assert greedy(model, prompts, max_length=3) == generated(model, prompts, max_length=3)


@pytest.mark.slow
@pytest.mark.parametrize("window", [2, 5])
def test_layers_with_a_sliding_window(window):
    """Gemma 2 has layers with a window and without; those of Qwen 2 are fused into one call."""
    for family in ("gemma2", "qwen2"):
        model = tiny_model(family, layers=3).double()
        config = model.config
        config.sliding_window = window
        config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
        for layer, kind in zip(model.model.layers, config.layer_types, strict=True):
            layer.attention_type = layer.self_attn.layer_type = kind
            layer.self_attn.sliding_window = window if kind == "sliding_attention" else None
        model.model.has_sliding_layers = True
        for prompt, response in zip(PROMPTS, greedy(model, PROMPTS), strict=True):
            for i, token in enumerate(response):
                logits = model(torch.tensor([prompt + response[:i]]), use_cache=False).logits
                assert logits[0, -1].argmax() == token
