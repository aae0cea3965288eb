"""Command lines of ``ppo-fast``, and what they say."""

from __future__ import annotations

import json
import re

import pytest

from ppo_fast.cli.main import main

PROMPTS = ["The film was", "She thought", "Nothing in this room"]


def arguments(*more, **changes):
    """A run of two steps."""
    flags = {
        "policy": "model",
        "prompts": "prompts.txt",
        "reward": "my_reward:length",
        "output_dir": "run",
        "num_steps": 2,
        "batch_size": 2,
        "max_length": 4,
        "num_epochs": 1,
        "device": "cpu",
        "learning_rate": 0.001,
    } | changes
    named = [(f"--{name.replace('_', '-')}", str(v)) for name, v in flags.items() if v is not None]
    return ["train", *(part for pair in named for part in pair), *more]


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def fails(capsys, *argv):
    """What a command that ends with status 2 says on stderr."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    return said.err


def fails_in_a_line(capsys, *argv):
    bars = "Loading weights"  # of transformers
    said = fails(capsys, *argv).splitlines()
    first, hint = (line for line in said if line and bars not in line)
    assert hint == "(PPO_FAST_TRACEBACK=1 shows where)"
    assert first.startswith("ppo-fast: ")
    return first.removeprefix("ppo-fast: ")


def write(path, text):
    path.write_text(text, "utf-8")
    return path


def flat(text):
    """Without the boxes and line breaks of a terminal."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


def help_of(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        main([*argv, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out
