"""ClassifierReward: sequence classifiers with tokenizers of their own."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_models import tiny_classifier, tiny_config, tiny_tokenizer
from tiny_trainer import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from ppo_fast import PPO, PPOConfig
from ppo_fast.rewards.classifier import ClassifierReward

PROMPTS = ["The film", "She", "Nothing in this room"]
COMPLETIONS = [" was over", " thought the phone would last", " was"]
TEXTS = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]


def letters(*, limit=128, bos=False):
    """A tokenizer with one id per character: another vocabulary than the policy's."""
    vocabulary = {"<pad>": 0, "<s>": 1, **{chr(c): c - 30 for c in range(32, 127)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<pad>", "<s>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=limit,
    )


def sentiment(family="gpt2", labels=("NEGATIVE", "NEUTRAL", "POSITIVE")):
    config = tiny_config(family, pad_token_id=0)
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


@torch.no_grad()
def logits_alone(model, tokenizer, texts):
    rows = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    return torch.stack(rows)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_scores_do_not_depend_on_batches(batch_size):
    """Texts are right-padded for the classifier, though the tokenizer pads on the left."""
    model, tokenizer = tiny_classifier("gpt2", pad_token_id=0), letters()
    found = ClassifierReward(model, tokenizer, batch_size=batch_size)(PROMPTS, COMPLETIONS)
    expected = logits_alone(model, tokenizer, TEXTS)[:, 0]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-4)
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize(("label", "index"), [("POSITIVE", 2), ("positive", 2), (0, 0)])
def test_a_label_scores_by_its_log_odds(label, index):
    model, tokenizer = sentiment(), letters()
    found = ClassifierReward(model, tokenizer, label=label)(PROMPTS, COMPLETIONS)
    p = logits_alone(model, tokenizer, TEXTS).softmax(-1)[:, index]
    torch.testing.assert_close(torch.tensor(found), p.logit(), rtol=1e-4, atol=1e-4)


def test_labels_that_do_not_exclude_one_another():
    model, tokenizer = sentiment(), letters()
    model.config.problem_type = "multi_label_classification"
    found = ClassifierReward(model, tokenizer, label=1)(PROMPTS, COMPLETIONS)
    expected = logits_alone(model, tokenizer, TEXTS)[:, 1]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-4)


def test_the_label_of_a_model_with_one():
    model = tiny_classifier("gpt2", pad_token_id=0)
    plain = ClassifierReward(model, letters())(PROMPTS, COMPLETIONS)
    assert ClassifierReward(model, letters(), label=0)(PROMPTS, COMPLETIONS) == plain
    with pytest.raises(ValueError, match="label: got 1, expected one of LABEL_0"):
        ClassifierReward(model, letters(), label=1)


def test_the_label_must_be_said_and_be_one():
    with pytest.raises(ValueError, match=r"labels NEGATIVE, NEUTRAL, POSITIVE; .*label='POSITIVE'"):
        ClassifierReward(sentiment(), letters())
    with pytest.raises(ValueError, match="label: got 'HAPPY', expected one of NEGATIVE, NEUTRAL"):
        ClassifierReward(sentiment(), letters(), label="HAPPY")
    tokenizer = letters()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="the classifier's tokenizer has no pad token"):
        ClassifierReward(sentiment(), tokenizer, label=1)


def test_of_a_long_text_the_beginning_is_cut(caplog):
    model, tokenizer = tiny_classifier("gpt2", pad_token_id=0), letters(limit=10**30)
    reward = ClassifierReward(model, tokenizer)
    assert reward.max_length == 128, "as the model takes"
    prompts, ends = ["x" * 300] * 2, [" good", " bad"]
    with caplog.at_level(logging.WARNING):
        found = reward(prompts, ends)
        reward(prompts, ends)
    expected = logits_alone(
        model, tokenizer, [(p + e)[-128:] for p, e in zip(prompts, ends, strict=True)]
    )
    torch.testing.assert_close(torch.tensor(found), expected[:, 0], rtol=1e-4, atol=1e-4)
    assert found[0] != found[1], "the completions differ"
    (record,) = caplog.records
    assert "the last 128 tokens of longer texts" in record.getMessage()
    assert tokenizer.truncation_side == "right"


def test_one_bos_where_a_chat_template_wrote_it():
    model, tokenizer = tiny_classifier("gpt2", pad_token_id=0), letters(bos=True)
    reward = ClassifierReward(model, tokenizer)
    assert reward(["<s>The film"], [" was"]) == reward(["The film"], [" was"])


def test_it_follows_the_trainer_and_other_vocabularies_are_named():
    policy, tokenizer = tiny_model(), tiny_tokenizer()
    moved = []
    model = tiny_classifier("gpt2", pad_token_id=0)
    model.to = lambda device: moved.append(str(device)) or model
    config = PPOConfig(critic="head", max_length=4)
    PPO(policy, tokenizer, ClassifierReward(model, letters()), device="cpu", config=config)
    assert moved == ["cpu"]
    small = tiny_classifier("gpt2", vocab_size=41, pad_token_id=1)
    with pytest.raises(ValueError, match=r"reward_model has 41 embeddings; .*ClassifierReward\("):
        PPO(policy, tokenizer, small, config=config)
    small = tiny_classifier("gpt2", pad_token_id=1)
    small.config.pad_token_id = -1
    with pytest.raises(
        ValueError, match=r"pad_token_id=-1, .*set reward_model.config.pad_token_id"
    ):
        PPO(policy, tokenizer, small, config=config)
