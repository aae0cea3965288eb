"""Every example runs, at a tiny size, and says its command and what to expect."""

from __future__ import annotations

import ast
import inspect
import re
import runpy
from pathlib import Path

import pytest
from tiny_models import tiny_model, tiny_tokenizer

import ppo_fast.demo.smollm2

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
NAMES = {
    "answers_from_columns",
    "chat",
    "classifier_reward",
    "constitution",
    "http_reward",
    "lora",
    "python_reward",
    "reward_model_then_ppo",
    "weighted_rewards",
}
# Of main's parameters, those that bound the work.
TINY = {"num_steps": 1, "batch_size": 4}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tiny_smollm2():
    model, tokenizer = tiny_model(layers=5, hidden=32), tiny_tokenizer()
    model.config.max_position_embeddings = tokenizer.model_max_length = 2048
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


def test_all_are_there():
    assert {path.stem for path in EXAMPLES} == NAMES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_say_what_to_expect(path):
    text = path.read_text("utf-8")
    words = ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) < 60
    assert f"python examples/{path.name}" in words
    assert re.search(r"Expect .*\d", words, re.DOTALL), "the number to expect"
    assert " minutes" in words


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ppo_fast.demo.smollm2, "load_smollm2", tiny_smollm2)
    main = runpy.run_path(str(path))["main"]
    known = inspect.signature(main).parameters
    assert known.keys() >= TINY.keys()
    main(**{name: size for name, size in TINY.items() if name in known})
    out = capsys.readouterr().out
    assert re.search(r"\d -> [-+]?\d|before.*\d.*after.*\d", out, re.DOTALL), "before and after"
