"""``ppo-fast train --config``."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import yaml
from command_line import arguments, fails_in_a_line, lines, write

from ppo_fast.cli.config_file import read_config
from ppo_fast.cli.main import main, parse
from ppo_fast.cli.train import Train


def test_config_file_with_flags_over_it(place):
    settings = {
        "policy": "model",
        "prompts": "prompts.txt",
        "reward": "my_reward:length",
        "output_dir": "from_file",
        "num_steps": 1,
        "batch_size": 3,
        "max_length": 5,
        "gamma": 0.9,
        "adam_betas": [0.8, 0.9],
        "critic": "head",
    }
    write(place / "run.yaml", yaml.safe_dump(settings) + "learning_rate: 1e-4\n")
    main(["train", "--config", "run.yaml", "--max-length", "3", "--gamma=0.95"])
    resolved = yaml.safe_load((place / "from_file/config.yaml").read_text())
    assert resolved["max_length"] == 3
    assert resolved["gamma"] == 0.95
    assert resolved["learning_rate"] == 1e-4, "1e-4 is a number in a YAML file as well"
    assert resolved["adam_betas"] == [0.8, 0.9]
    assert resolved["critic"] == "head"
    assert len(lines(place / "from_file/samples.jsonl")) == 3


def test_the_resolved_config_is_a_config_file(place):
    main(arguments("--adam-betas", "0.8", "0.95", num_steps=1))
    run = read_config(place / "run/config.yaml")
    parsed = parse(arguments("--adam-betas", "0.8", "0.95", num_steps=1))
    assert run.ppo == parsed.ppo
    for field in fields(Train):
        if field.name != "config":
            assert getattr(run, field.name) == getattr(parsed, field.name), field.name
    main(["train", "--config=run/config.yaml", "--resume", "--num-steps", "2"])
    assert [row["step"] for row in lines(place / "run/metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 0.1", r"--config: run\.yaml line 1 sets 'lerning.*mean learning_rate\?"),
        ("out_dir: x", r"sets 'out_dir', which is no flag; did you mean output_dir\?"),
        ("qqq: 1", r"sets 'qqq', which is no flag$"),
        ("gamma: 3", r"gamma: got 3, expected a number in \[0, 1\]"),
        (
            "seed: 1\n\n# x\ngamma: 3",
            r"--config: run\.yaml line 4: gamma: got 3, expected a number",
        ),
        ("seed: 1\nbatch_size: x", r"run\.yaml line 2: batch_size: got 'x', expected a whole"),
        ("seed: 1\ncritic: top", r"run\.yaml line 2: critic='top' is trained above"),
        ("- a\n- b", r"--config: run\.yaml holds no mapping"),
    ],
)
def test_bad_config_file(place, capsys, text, message):
    write(place / "run.yaml", text)
    assert re.search(message, fails_in_a_line(capsys, "train", "--config", "run.yaml"))


def test_no_config_file(place, capsys):
    assert "--config: no file no.yaml" in fails_in_a_line(capsys, "train", "--config", "no.yaml")
