"""The code of docs/constitution.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_models import tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS

from ppo_fast.rewards.principles import KEYS, default_principles

PAGE = (Path(__file__).parents[2] / "docs" / "constitution.md").read_text("utf-8")


@pytest.mark.slow
def test_the_code_runs_in_order():
    policy, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.model_max_length = policy.config.max_position_embeddings = 512
    names = {
        "policy": policy,
        "tokenizer": tokenizer,
        "judge_model": tiny_model(seed=1),
        "judge_tokenizer": tiny_tokenizer(),
        "prompts": [*PROMPTS] * 3,
    }
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code, names)
    assert f"reward/constitution/{default_principles()[0].name}/mean" in names["step"].metrics
    assert set(names["parts"]) == {"kindness", "brevity"}
    assert set(names["pairs"][0]) == {"prompt", "chosen", "rejected"}
    assert names["rows"][0]["prompt"] == PROMPTS[0]


def test_it_names_the_principles_and_keys():
    assert all(f"**{principle.name}**" in PAGE for principle in default_principles())
    assert {"question", "rules", "weight", "enabled"} <= set(KEYS)
