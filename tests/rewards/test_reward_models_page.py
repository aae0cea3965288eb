"""The code in docs/reward_models.md runs, and its commands and formats are those that there are."""

from __future__ import annotations

import re
from pathlib import Path

from tiny_models import tiny_model, tiny_tokenizer

from ppo_fast.cli.main import parse
from ppo_fast.rewards.encoding import FORMATS

PAGE = (Path(__file__).parents[2] / "docs" / "reward_models.md").read_text("utf-8")


def test_the_code_runs_in_its_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_model(layers=1, hidden=32).save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    names = {"base": "base"}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code, names)
    assert re.match(r"[01]\.0 0\.\d+\n", capsys.readouterr().out)
    assert (tmp_path / "reward/config.json").exists()
    step = names["ppo"].step(["What is tea?"] * 2)
    assert step.metrics["mean_reward"] != 0
    assert names["config"].lora_rank == 16


def test_formats_and_commands():
    assert tuple(re.findall(r'^\| `"(\w+)"` \|', PAGE, re.MULTILINE)) == FORMATS
    (commands,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    reward, train = (parse(line.split()[1:]) for line in commands.splitlines())
    assert reward.settings.lora_rank == 16
    assert str(reward.output_dir / "model") in train.reward
