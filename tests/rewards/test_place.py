"""Rewards on their device: what place_reward warns of."""

from __future__ import annotations

import logging

import pytest
from tiny_models import tiny_classifier, tiny_tokenizer
from tiny_pairs import tiny_pairs
from tiny_trainer import tiny_trainer

from ppo_fast.rewards.classifier import ClassifierReward
from ppo_fast.rewards.fit.settings import RewardModelConfig
from ppo_fast.rewards.fit.train import train_reward_model


@pytest.mark.parametrize("format", ["joined", "pair", "policy", None])
def test_a_module_that_was_trained_on_other_tokens(format, caplog):
    model = tiny_classifier(hidden=32)
    if format is not None:
        config = RewardModelConfig(format=format)
        train_reward_model(model, tiny_tokenizer(), tiny_pairs(4), config=config, held_out=None)
    with caplog.at_level(logging.WARNING):
        tiny_trainer(ClassifierReward(model, tiny_tokenizer()), critic="head")
        assert not caplog.records, "it reads texts in the format that it was trained with"
        tiny_trainer(model, critic="head")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (format in ("joined", "pair"))
    for line in said:
        assert f"LlamaForSequenceClassification was trained with format={format!r}" in line
        assert "pass ClassifierReward(reward_model, its_tokenizer)" in line
