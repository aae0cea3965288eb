"""Value models that start from reward models."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_classifier
from tiny_trainer import changed, tiny_reward_model, weights
from transformers import BertConfig, BertForSequenceClassification

from ppo_fast import RewardModel, ValueModel

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.mark.parametrize("kind", ["ours", "classifier"])
def test_values_are_the_scores_of_what_ends_there(kind):
    reward_model = tiny_reward_model().eval() if kind == "ours" else tiny_classifier()
    values = ValueModel.from_reward_model(reward_model).eval()(IDS)
    for t in range(1, IDS.shape[1] + 1):
        found = reward_model(IDS[:, :t])
        scores = found if isinstance(reward_model, RewardModel) else found.logits[:, 0]
        torch.testing.assert_close(values[:, t - 1], scores)


def test_it_is_a_copy_that_can_be_trained():
    reward_model = tiny_reward_model().requires_grad_(False)
    before = weights(reward_model)
    value_model = ValueModel.from_reward_model(reward_model)
    assert all(weight.requires_grad for weight in value_model.parameters())
    with torch.no_grad():
        for weight in value_model.parameters():
            weight += 1
    assert not changed(reward_model, before)


def test_what_is_no_reward_model_is_refused():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=1, **sizes))
    with pytest.raises(TypeError, match="got BertForSequenceClassification, expected a ppo_fast"):
        ValueModel.from_reward_model(encoder)
    two = tiny_classifier()
    two.score = torch.nn.Linear(64, 2)
    with pytest.raises(ValueError, match="has 2 labels, expected 1"):
        ValueModel.from_reward_model(two)
