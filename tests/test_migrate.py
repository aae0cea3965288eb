"""The code of docs/migrate.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_models import tiny_classifier, tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS, count_letters, tiny_value_model

from ppo_fast import PPO, PPOConfig, ValueModel

PAGE = (Path(__file__).parents[1] / "docs" / "migrate.md").read_text("utf-8")
BLOCKS = [
    block
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    if "from ppo_fast" in block
]


def test_there_are_blocks_for_each_of_them():
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs(number, tmp_path):
    policy, tokenizer = tiny_model(), tiny_tokenizer()
    config = PPOConfig(critic="baseline", max_length=4)
    names = {
        "policy": policy,
        "tokenizer": tokenizer,
        "reward_model": tiny_classifier(),
        "value_model": tiny_value_model(),
        "prompts": PROMPTS,
        "batches": [PROMPTS[:2], PROMPTS[2:]],
        "score": count_letters,
        "query_ids": [[5, 6, 7], [8]],
        "response_ids": [[9, 10], [11, 12, 13]],
    }
    if "ppo = " not in BLOCKS[number]:
        names["ppo"] = PPO(policy, tokenizer, count_letters, config=config)
    code = BLOCKS[number]
    code = code.replace("response_length=53", "response_length=3, bf16=False")
    code = code.replace("num_steps=100, batch_size=64", "num_steps=2, batch_size=2")
    code = code.replace('"out"', repr(str(tmp_path)))
    exec(code, names)
    assert names["ppo"].progress.steps >= 1


def test_a_classifier_becomes_a_value_model():
    classifier = tiny_classifier()
    value_model = ValueModel.from_reward_model(classifier)
    found = value_model.base_model.state_dict().keys()
    assert found == classifier.base_model.state_dict().keys()
