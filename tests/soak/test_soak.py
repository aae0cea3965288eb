"""A small soak, and that its checks notice what is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tiny_models import tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS, tiny_trainer

from ppo_fast.exports.export import export_policy
from soak.fuzz import run_one
from soak.kept_whole import damage_of_export, differences, lost
from soak.part import Found, State
from soak.run import SMALL
from soak.steady import Measured, risen

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="file_faults.c is for Linux")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_small_soak_loses_nothing(tmp_path):
    path = os.pathsep.join([str(TESTS), str(TESTS / "helpers")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "soak.run", "--small", "--folder", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    states = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in SMALL}
    assert {name: state["next"] for name, state in states.items()} == SMALL
    assert states["kills"]["counts"]["kills"] > SMALL["kills"] / 2
    assert states["faults"]["counts"]["happened"] > SMALL["faults"] / 2
    assert states["fuzz"]["counts"]["result"] > 10
    assert states["fuzz"]["counts"]["refused"] > 10


# The checks


@pytest.fixture
def run(tmp_path):
    """A folder as of a run of two steps with checkpoints of both."""
    trainer = tiny_trainer(critic="head", layers=1)
    folder = tmp_path / "run"
    for step in (1, 2):
        trainer.train_step(PROMPTS[:2])
        trainer.save_checkpoint(folder / "checkpoints", step)
    lines = "".join(json.dumps({"step": step, "time": 1.0}) + "\n" for step in (1, 2))
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).write_text(lines)
    export_policy(trainer.policy.model, trainer.tokenizer, folder / "policy")
    assert not [*lost(folder, 2, exported=True)]
    return folder


def said(found):
    (text,) = found
    return text


def test_a_lost_checkpoint_is_seen(run):
    (run / "checkpoints/ppo_checkpoint_step_2.pt").unlink()
    assert "checkpoint of step 2 is gone" in said(lost(run, 2, exported=True))
    assert not [*lost(run, 1, exported=True)]


def test_a_half_written_checkpoint_is_seen(run):
    path = run / "checkpoints/ppo_checkpoint_step_2.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "half written under its final name" in said(lost(run, 2, exported=True))


def test_a_lost_line_is_seen(run):
    (run / "samples.jsonl").write_text('{"step": 1}\n{"st')
    assert said(lost(run, 2, exported=True)).startswith("samples.jsonl lacks steps [2]")


def test_a_lost_or_damaged_export_is_seen(run):
    path = run / "policy/model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert "model.safetensors cannot be loaded" in said(damage_of_export(run / "policy"))
    shutil.rmtree(run / "policy")
    assert said(lost(run, 2, exported=True)) == "policy/ is gone"
    assert not [*lost(run, 2, exported=False)]


def test_every_difference_of_an_end_is_seen(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    assert not [*differences(run, other, 2)]
    shutil.copy(*(run / f"checkpoints/ppo_checkpoint_step_{step}.pt" for step in (1, 2)))
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 2}\n')
    (run / "policy/config.json").write_text("{}")
    (run / "policy/.ppo_fast-x.partial").write_text("")
    found = " ".join(differences(run, other, 2))
    for text in ("last checkpoint differs", "steps [1, 2, 2]", "policy/config.json", "policy/ has"):
        assert text in found
    assert "left half written" in found


def test_what_rises_is_seen():
    first = Measured(20, 100.0, 10, 4, 5000)
    assert risen(first, Measured(100, 101.0, 10, 4, 5003)) == []
    assert len(risen(first, Measured(100, 120.0, 11, 5, 9000))) == 4


def test_an_error_that_is_not_ours_is_a_failure(tmp_path, monkeypatch):
    models = tiny_model(layers=2, hidden=16), tiny_model(layers=1, hidden=16)

    def outcome(seed):
        return run_one(seed, models, tiny_tokenizer(), tmp_path)

    fits = next(seed for seed in range(20) if outcome(seed)[0] == "result")
    monkeypatch.setattr("ppo_fast.rollout.texts.Texts.decode", lambda *arguments: {}["missing"])
    found, text = outcome(fits)
    assert found == "failure"
    assert "KeyError: 'missing'" in text


# Going on


class Counting:
    """A part whose cases fail when their number is 3."""

    counted, target = "cases", 5
    seen: list[int]

    def __init__(self):
        self.seen = []

    def case(self, seed):
        self.seen.append(seed)
        return Found(Counter(cases=1), ["lost"] if seed == 3 else [])


def test_a_part_goes_on_where_it_was(tmp_path):
    path, part = tmp_path / "state.json", Counting()
    assert not State(path).run(part, 60, 2)
    assert State(path).run(part, 60)
    assert part.seen == [0, 1, 2, 3, 4]
    assert State(path).failures == [{"case": 3, "what": "lost"}]
    assert State(path).run(part, 60)
    assert len(part.seen) == 5, "its target is reached"


def test_a_mended_case_is_no_failure_any_more(tmp_path):
    path, part = tmp_path / "state.json", Counting()
    State(path).run(part, 60)
    State(path).try_again(part)
    assert State(path).failures == [{"case": 3, "what": "lost"}]
    part.case = lambda seed: Found(Counter(), [])
    State(path).try_again(part)
    assert State(path).failures == []
    assert State(path).counts["cases"] == 5
