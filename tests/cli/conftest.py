"""A place for ``ppo-fast train`` to run in."""

from __future__ import annotations

import pytest
from command_line import PROMPTS
from tiny_models import tiny_model, tiny_tokenizer

REWARD = """
calls = []

def length(prompts, completions):
    calls.append((prompts, completions))
    return [len(text) / 10 for text in completions]

number = 3
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a model, prompts and a reward."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    # a module of the same name must not stay from another test
    monkeypatch.delitem(__import__("sys").modules, "my_reward", raising=False)
    tiny_model(layers=1, hidden=32).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    (tmp_path / "my_reward.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n", "utf-8")
    return tmp_path
