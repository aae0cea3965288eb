"""Rewards of preference pairs in packed passes: those of the model called on each text."""

from __future__ import annotations

import pytest
import torch
from reward_fits import PAIRS, TOKENIZER, fit, reward_model
from tiny_models import tiny_classifier
from transformers import BertConfig, BertForSequenceClassification

from ppo_fast.rewards.fit import train
from ppo_fast.rewards.fit.packed import packed_rewards, pair_tokens


def rows(side: str) -> list[dict[str, list[int]]]:
    return [{"input_ids": TOKENIZER(p["prompt"] + p[side])["input_ids"]} for p in PAIRS[:4]]


def test_what_both_responses_begin_with_stands_once():
    chosen = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6]}, {"input_ids": [7]}]
    rejected = [{"input_ids": [1, 2, 9]}, {"input_ids": [5, 6, 8]}, {"input_ids": [7]}]
    tokens = pair_tokens(chosen, rejected, torch.device("cpu"))
    assert [row.tolist() for row in tokens.sequences()] == [
        row["input_ids"] for row in chosen + rejected
    ]
    assert tokens.prompt_lengths.tolist() == [2, 1, 0] * 2, "a last token is a response's"
    assert len(tokens.packing) == (2 + 2 + 1) + (1 + 1 + 2) + 1 + 1


@pytest.mark.parametrize(
    "make", [reward_model, tiny_classifier, lambda: tiny_classifier("gpt2")], ids=str
)
def test_rewards_and_gradients_are_the_models(make):
    model = make().eval()
    packed = packed_rewards(model, None)
    found = packed(rows("chosen"), rows("rejected"))
    texts = [row["input_ids"] for row in rows("chosen") + rows("rejected")]
    outputs = [model(torch.tensor([ids])) for ids in texts]
    expected = torch.cat([getattr(out, "logits", out).view(1) for out in outputs]).view(2, -1)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    weights = [p for p in model.parameters() if p.requires_grad]
    gradients = [
        torch.autograd.grad((rewards[0] - rewards[1]).sum(), weights, allow_unused=True)
        for rewards in (found, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_training_takes_packed_passes(monkeypatch):
    monkeypatch.setattr(train, "rewards_of", lambda *_: pytest.fail("a padded pass"))
    assert fit(tiny_classifier(), PAIRS[:8], num_epochs=1).history


def test_an_encoder_is_padded():
    config = BertConfig(
        vocab_size=307,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=1,
    )
    assert packed_rewards(BertForSequenceClassification(config).eval(), None) is None
