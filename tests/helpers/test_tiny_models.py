"""The tiny models behave as the transformers models of their families."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    FAMILIES,
    VOCAB_SIZE,
    tiny_classifier,
    tiny_model,
    tiny_tokenizer,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from ppo_fast.models.transformers_internals import cache_argument

TEXTS = ["The film was", "Naïve 😀 songs, and then the bread"]


def encode(texts, tokenizer=None):
    batch = (tokenizer or tiny_tokenizer())(texts, padding=True, return_tensors="pt")
    position_ids = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    return batch.input_ids, batch.attention_mask, position_ids


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_tokenizer(tmp_path, pad_is_eos):
    tokenizer = tiny_tokenizer(pad_is_eos=pad_is_eos)
    assert len(tokenizer) == VOCAB_SIZE
    assert (tokenizer.pad_token_id == tokenizer.eos_token_id) == pad_is_eos
    tokenizer.save_pretrained(tmp_path)
    for candidate in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids, mask, _ = encode(TEXTS, candidate)
        assert mask[0, 0] == 0, "padding goes to the left"
        assert (ids[mask == 0] == tokenizer.pad_token_id).all()
        assert [
            candidate.decode(row[keep.bool()]) for row, keep in zip(ids, mask, strict=True)
        ] == (TEXTS)
    assert "".join(TEXTS) == tokenizer.decode(tokenizer.encode("".join(TEXTS)))


@pytest.mark.parametrize("family", FAMILIES)
def test_model_decodes_with_a_cache(family):
    model = tiny_model(family)
    ids, mask, positions = encode(TEXTS)
    cache = cache_argument(model)
    with torch.no_grad():
        full = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        prefix = model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, :-1],
            use_cache=True,
            logits_to_keep=1,
        )
        last = model(
            input_ids=ids[:, -1:],
            attention_mask=mask,
            position_ids=positions[:, -1:],
            use_cache=True,
            logits_to_keep=1,
            **{cache: prefix[cache]},
        )
    assert full.dtype == torch.float32
    assert full.shape == (2, ids.shape[1], VOCAB_SIZE)
    assert prefix.logits.shape == last.logits.shape == (2, 1, VOCAB_SIZE)
    torch.testing.assert_close(prefix.logits[:, 0], full[:, -2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last.logits[:, 0], full[:, -1], rtol=1e-4, atol=1e-4)
    assert full.std() > 0.5, "logits should not be flat"


@pytest.mark.parametrize("family", FAMILIES)
def test_model_is_reproducible_and_saves(family, tmp_path):
    random_state = torch.random.get_rng_state()
    model = tiny_model(family)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids, mask, positions = encode(TEXTS)

    def logits(of):
        with torch.no_grad():
            return of(input_ids=ids, attention_mask=mask, position_ids=positions).logits

    # Close, not equal: a product's last bits depend on the alignment of its weights.
    torch.testing.assert_close(logits(model), logits(loaded))
    torch.testing.assert_close(logits(model), logits(tiny_model(family)))
    assert not torch.allclose(logits(model), logits(tiny_model(family, seed=1)), atol=0.1)


def test_families_differ_where_it_matters():
    llama, gpt2 = tiny_model("llama"), tiny_model("gpt2")
    assert llama.config.num_key_value_heads < llama.config.num_attention_heads
    assert llama.lm_head.weight is not llama.model.embed_tokens.weight
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    assert tiny_model("gemma2").config.final_logit_softcapping is not None
    assert tiny_model("cohere").config.logit_scale != 1
    ids, mask, positions = encode(TEXTS)
    gpt2.train()
    first, second = (gpt2(ids, attention_mask=mask, position_ids=positions).logits for _ in "ab")
    assert not torch.equal(first, second), "GPT-2 keeps its dropout"


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "cohere"])
def test_classifier(family, tmp_path):
    model = tiny_classifier(family, vocab_size=311, layers=1, hidden=32)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids, mask, _ = encode(TEXTS)
    with torch.no_grad():
        scores, again = (of(ids, attention_mask=mask).logits for of in (model, loaded))
    assert scores.shape == (2, 1)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, again)
    assert (scores[0] - scores[1]).abs() > 1e-3
