"""A run's folder and its lines on the console."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from tiny_trainer import PROMPTS, tiny_trainer

from ppo_fast import PPOConfig
from ppo_fast.data.rollout import Rollout
from ppo_fast.data.sampling import Sampling
from ppo_fast.data.step import Step
from ppo_fast.data.tokens import make_tokens
from ppo_fast.run_folder.folder import RunFolder
from ppo_fast.runs.display import StepDisplay

METRICS = {
    "mean_reward": 0.25,
    "kl_sequence": 1.5,
    "clip_fraction": 0.125,
    "entropy": 5.0,
    "time/rollout": 2.0,
    "time/experience": 0.5,
    "time/update": 1.0,
}


def records(path):
    """Read one record per line, as strict JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = path.read_text("utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text[:-1].split("\n")]


def test_folder_is_made(tmp_path):
    for _ in range(2):
        with RunFolder(tmp_path / "a" / "b"):
            assert (tmp_path / "a" / "b").is_dir()


def test_metrics_append_a_line_per_step(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_metrics(1, {"mean_reward": 0.5})
    assert len(records(tmp_path / "metrics.jsonl")) == 1, "on disk at once"
    folder.close()
    with RunFolder(tmp_path) as folder:
        folder.write_metrics(2, {"mean_reward": -1e-30})
    first, second = records(tmp_path / "metrics.jsonl")
    assert (first["step"], first["mean_reward"]) == (1, 0.5)
    assert (second["step"], second["mean_reward"]) == (2, -1e-30)
    assert second["time"] >= first["time"] > 1e9


def test_a_resumed_run_repeats_the_steps_after_its_checkpoint(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.write_metrics(step, {"mean_reward": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "mean_re')  # killed while it wrote a line
    folder.forget_after(2)
    folder.write_metrics(3, {"mean_reward": 30.0})
    found = [(r["step"], r["mean_reward"]) for r in records(tmp_path / "metrics.jsonl")]
    assert found == [(1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinite_metrics_are_written_as_null(tmp_path, value):
    RunFolder(tmp_path).write_metrics(1, {"mean_reward": value, "entropy": 1.0})
    (record,) = records(tmp_path / "metrics.jsonl")
    assert record["mean_reward"] is None
    assert record["entropy"] == 1.0


def test_metrics_of_a_real_step(tmp_path):
    metrics = tiny_trainer().train_step(PROMPTS)
    RunFolder(tmp_path).write_metrics(1, metrics)
    (record,) = records(tmp_path / "metrics.jsonl")
    assert metrics.items() <= record.items()


def test_samples_are_a_line_per_sequence(tmp_path):
    trainer = tiny_trainer()
    rollout = trainer.rollout(PROMPTS[:3])
    texts = ['a "quote"\nand a break', "naïve 😀 \u2028", ""]
    rollout = replace(rollout, completions=texts)
    folder = RunFolder(tmp_path)
    folder.write_samples(Step(1, {}, rollout, torch.tensor([1.0, -0.5, 0.0])))
    folder.write_samples(Step(2, {}, rollout, torch.tensor([2.0, 3.0, 4.0])))
    rows = records(tmp_path / "samples.jsonl")
    assert [row["step"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert [row["prompt"] for row in rows] == PROMPTS[:3] * 2
    assert [row["completion"] for row in rows] == texts * 2
    assert [row["score"] for row in rows] == [1.0, -0.5, 0.0, 2.0, 3.0, 4.0]
    assert "naïve 😀" in (tmp_path / "samples.jsonl").read_text("utf-8"), "to be read by people"


def test_config_holds_every_setting(tmp_path):
    config = PPOConfig(gamma=0.9, adam_betas=(0.8, 0.9), critic="head", stop_token_ids=(7,))
    RunFolder(tmp_path).write_config(config, policy="model", output_dir=Path("a/b"), resume=False)
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text("utf-8"))
    expected = asdict(config) | {
        "adam_betas": [0.8, 0.9],
        "stop_token_ids": [7],
        "stop_strings": [],
        "frozen": [],
        "offload": [],
        "reward_weights": [],
        "value_frozen": [],
        "importance_range": [0.0, 2.0],
    }
    assert settings == expected | {"policy": "model", "output_dir": "a/b", "resume": False}


def a_step(number, metrics):
    """Return a step with 100 tokens in two responses."""
    tokens = make_tokens([[1], [2]], [[3] * 60, [4] * 40], 0, torch.device("cpu"))
    drawn = torch.zeros(2, 60)
    rollout = Rollout(tokens, drawn, drawn, torch.ones(2, dtype=torch.bool), Sampling(60))
    return Step(number, metrics, rollout, torch.zeros(2))


def shown(**console):
    file = io.StringIO()
    with StepDisplay(Console(file=file, **console), 2) as display:
        display.show(a_step(7, METRICS))
        display.show(a_step(8, METRICS | {"mean_reward": -1.0}))
    return file.getvalue()


def test_plain_lines_off_a_terminal():
    text = shown(width=40)
    assert "\x1b" not in text
    first, second = text.rstrip().splitlines()  # rich before 15 ends with an empty line
    assert first.startswith("step   7  reward +0.250  KL   1.50/seq  clip 0.125  entropy 5.00")
    assert "  50 tok/s" in first, "tokens over the seconds of the rollout"
    assert "rollout 2.0s experience 0.5s update 1.0s" in first
    assert first.endswith(" min")
    assert second.startswith("step   8  reward -1.000")
    assert second.endswith("left 0.0 min")


def test_a_progress_bar_on_a_terminal():
    text = shown(force_terminal=True, width=200)
    assert "\x1b" in text
    assert "2/2" in text
    assert "step   7  reward +0.250" in text
