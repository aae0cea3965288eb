"""README's code runs, and README keeps its own limits."""

import re
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_trainer import tiny_trainer

ROOT = Path(__file__).parents[1]
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(word):
    (found,) = [code for code in BLOCKS if word in code]
    return found


@pytest.mark.filterwarnings("ignore")
def test_the_first_example_runs(tmp_path, capsys):
    tiny_model(layers=6, hidden=32).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    code = block("brevity").replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tmp_path))
    code = code.replace("num_steps=50", "num_steps=2").replace("max_length=32", "max_length=5")
    names = {}
    exec(code, names)
    assert names["ppo"].progress.steps == 2


def test_the_operation_runs():
    rewards, values = torch.randn(2, 3, 7)
    names = {"rewards": rewards, "values": values, "mask": torch.ones(3, 7, dtype=torch.bool)}
    exec(block("import gae"), names)
    assert names["advantages"].shape == names["returns"].shape == (3, 7)


def test_the_open_loop_runs():
    names = {
        "ppo": tiny_trainer(critic="head"),
        "prompts": ["The film was", "There"],
        "my_scores": lambda texts: [float(len(text)) for text in texts],
    }
    exec(block("ppo.rollout"), names)
    assert names["metrics"]["mean_reward"] > 0


def test_readme_is_short_and_starts_with_code():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert next(i for i, line in enumerate(lines) if line.startswith("```")) < 50


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", *DOCS])
def test_the_targets_of_links_exist(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text("utf-8")):
        assert (path.parent / target).exists(), target
