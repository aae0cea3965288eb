"""Evaluations, early stops, the best weights, control.yaml and trackers of ``ppo-fast train``."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
from command_line import arguments, fails_in_a_line, lines, write
from transformers import AutoModelForCausalLM

from ppo_fast.checkpointing.checkpoint import load, save
from ppo_fast.checkpointing.manifest import MANIFEST
from ppo_fast.cli.main import main

HELD_OUT = ["Another text", "One more"]
# the evaluations' mean rewards are 1, 3, 2, 1, 0
COURSE = """
numbers = iter([1, 3, 2, 1, 0, 0, 0])

def course(prompts, completions):
    if prompts[0] in {held_out}:
        return [next(numbers)] * len(prompts)
    return [len(text) / 10 for text in completions]

def length(prompts, completions):
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def place(place):
    write(place / "course.py", COURSE.format(held_out=HELD_OUT))
    write(place / "held.txt", "\n".join(HELD_OUT))
    return place


def evaluated(*more, **changes):
    settings = {"reward": "course.py:course", "held_out": "held.txt", "eval_every": 1}
    return arguments(*more, **(settings | changes))


def test_the_best_checkpoint_is_kept_and_exported(place, capsys):
    main(evaluated("--export-from", "best", "--keep-last", "1", num_steps=3))
    found = lines(place / "run/evaluations.jsonl")
    assert [(one["step"], one["reward"]) for one in found] == [(0, 1), (1, 3), (2, 2), (3, 1)]
    names = sorted(path.name for path in (place / "run/checkpoints").glob("*.pt"))
    assert names == ["ppo_checkpoint_step_1.pt", "ppo_checkpoint_step_3.pt"]
    best = load(place / "run/checkpoints/ppo_checkpoint_step_1.pt")["models"]["policy"]
    exported = AutoModelForCausalLM.from_pretrained(place / "run/policy").state_dict()
    assert all(torch.equal(exported[name], weight) for name, weight in best.items())
    out = capsys.readouterr().out
    assert "the weights are those of step 1, the best evaluation" in out
    assert "step 3" in out
    main(["train", "--config", "run/config.yaml", "--resume"])
    assert "nothing is left to do: all 3 steps are done" in capsys.readouterr().out


def test_patience_ends_the_run_with_its_results(place, capsys):
    main(evaluated("--patience", "2", num_steps=9))
    assert [row["step"] for row in lines(place / "run/metrics.jsonl")] == [1, 2, 3]
    assert (place / "run/policy/config.json").exists()
    events = [row["text"] for row in lines(place / "run/events.jsonl")]
    assert any("stopped by patience after step 3" in text for text in events)
    capsys.readouterr()
    main(["train", "--config", "run/config.yaml", "--resume"])
    assert "nothing is left to do" in capsys.readouterr().out


def test_other_rewards_and_greedy_responses(place):
    main(evaluated("--eval-reward", "course.py:length", "--eval-greedy", num_steps=1))
    found = lines(place / "run/evaluation_samples.jsonl")
    assert [row["score"] for row in found] == [len(row["completion"]) for row in found]
    assert len(found) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval-every", "2"], "--eval-every: needs prompts to evaluate on; add --held-out 0.1"),
        (["--patience", "2"], "--patience: needs prompts to evaluate on"),
        (["--export-from", "best"], "--export-from: needs prompts to evaluate on"),
        (
            ["--held-out", "held.txt", "--patience", "2"],
            "--patience: needs the steps between evaluations",
        ),
        (
            ["--held-out", "held.txt", "--eval-reward", "none.py:f"],
            "--eval-reward: no file none.py",
        ),
        (["--held-out", "held.txt", "--keep-best", "-1"], "--keep-best: got -1"),
        (["--held-out", "held.txt", "--eval-every", "0"], "--eval-every: got 0"),
        (
            ["--held-out", "held.txt", "--eval-greedy", "--eval-samples", "2"],
            "--eval-samples: got 2 with --eval-greedy",
        ),
        (["--best", "reward/length/mean"], "--best: needs prompts to evaluate on"),
        (["--report-to", "nothing"], "--report-to: "),
    ],
)
def test_what_is_refused_before_a_model_runs(place, capsys, flags, message):
    said = fails_in_a_line(capsys, *arguments(*flags))
    assert said.startswith(message)
    assert not (place / "run/metrics.jsonl").exists()


def test_an_unknown_metric_is_refused_before_training(place, capsys):
    said = fails_in_a_line(capsys, *evaluated("--best", "rewrad"))
    assert said.startswith("--best: got 'rewrad', expected a metric of the evaluation: reward, ")
    assert not (place / "run/metrics.jsonl").exists()


def test_control_yaml_changes_the_run(place, capsys):
    control = write((place / "run").mkdir() or place / "run/control.yaml", "learning_rate: 1e-6")
    os.utime(control, (time.time() - 9, time.time() - 9))
    main(arguments(num_steps=3))
    rates = [row["learning_rate"] for row in lines(place / "run/metrics.jsonl")]
    assert rates == [1e-3, 1e-6, 1e-6]
    assert not control.exists()
    texts = [row["text"] for row in lines(place / "run/events.jsonl")]
    assert any("learning_rate is 1e-06 instead of 0.001" in text for text in texts)


def test_a_resumed_run_repeats_no_line_of_evaluations(place):
    main(evaluated(num_steps=2))
    write(place / "course.py", COURSE.format(held_out=HELD_OUT).replace("[1, 3, 2,", "["))
    main(["train", "--config", "run/config.yaml", "--resume", "--num-steps", "3"])
    assert [row["step"] for row in lines(place / "run/evaluations.jsonl")] == [0, 1, 2, 3]
    assert [row["step"] for row in lines(place / "run/evaluation_samples.jsonl")] == [
        step for step in range(4) for _ in HELD_OUT
    ]
    assert json.loads((place / "run/results.json").read_text()) == {"step": 3, "weights_of": 3}


def test_the_best_weights_of_a_finished_run(place, capsys):
    main(evaluated("--keep-last", "1", num_steps=3))
    main(["train", "--config", "run/config.yaml", "--resume", "--export-from", "best"])
    assert "the weights are those of step 1, the best evaluation" in capsys.readouterr().out
    card = (place / "run/policy/README.md").read_text("utf-8")
    assert "| step | 1 |" in card
    assert "held out" in card
    main(["train", "--config", "run/config.yaml", "--resume"])
    assert "nothing is left to do: all 3 steps are done" in capsys.readouterr().out


def test_best_weights_that_are_gone(place, capsys):
    main(evaluated("--keep-best", "0", "--keep-last", "1", num_steps=3))
    main(["train", "--config", "run/config.yaml", "--resume", "--export-from", "best"])
    texts = [row["text"] for row in lines(place / "run/events.jsonl")]
    assert any("step 1 is the best, but its checkpoint is gone" in text for text in texts)
    assert (place / "run/policy/config.json").exists()


def test_an_evaluation_that_failed_is_made_up_for(place, capsys):
    main(evaluated("--keep-last", "1", num_steps=2))
    course = COURSE.format(held_out=HELD_OUT)
    write(place / "course.py", course.replace("[1, 3, 2, 1, 0, 0, 0]", "[]"))
    with pytest.raises(SystemExit):  # the reward fails in the evaluation
        main(["train", "--config", "run/config.yaml", "--resume", "--num-steps", "3"])
    assert [row["step"] for row in lines(place / "run/metrics.jsonl")] == [1, 2, 3]
    write(place / "course.py", course)
    main(["train", "--config", "run/config.yaml", "--resume"])
    assert [row["step"] for row in lines(place / "run/evaluations.jsonl")] == [0, 1, 2, 3]


def test_a_signal_in_the_last_step_costs_no_evaluation(place):
    """The checkpoint of a run that is continued has it too."""
    ends = "import os, signal\ncalls = []\n" + COURSE.format(held_out=HELD_OUT).replace(
        "    return [len(text) / 10",
        "    calls.append(1)\n"
        "    if len(calls) == 2:\n        signal.raise_signal(signal.SIGTERM)\n"
        "    return [len(text) / 10",
    )
    write(place / "course.py", ends)
    main(evaluated(num_steps=2, eval_every=9))
    assert [row["step"] for row in lines(place / "run/evaluations.jsonl")] == [0, 2]
    saved = load(place / "run/checkpoints/ppo_checkpoint_step_2.pt")
    assert [one["step"] for one in saved["evaluations"]] == [0, 2]


def test_an_evaluation_that_is_in_no_checkpoint_is_made_again(place, monkeypatch):
    """As after a kill between the lines of the last evaluation and the checkpoint with it."""
    main(evaluated(num_steps=2, eval_every=9))
    saved = place / "run/checkpoints/ppo_checkpoint_step_2.pt"
    contents = torch.load(saved, weights_only=True)
    contents["evaluations"].pop()
    del contents[MANIFEST]
    save(contents, saved)
    main(["train", "--config", "run/config.yaml", "--resume"])
    assert [row["step"] for row in lines(place / "run/evaluations.jsonl")] == [0, 2]
    assert len(lines(place / "run/evaluation_samples.jsonl")) == 4


def test_space_is_checked_once(place, monkeypatch):
    calls = []
    monkeypatch.setattr("ppo_fast.running.check_space", lambda *_, **given: calls.append(given))
    main(evaluated(num_steps=1))
    (given,) = calls
    assert (given["name"], given["keep_best"]) == ("output_dir", 1)


def test_a_dry_run_checks_the_evaluation(place, capsys):
    said = fails_in_a_line(capsys, *evaluated("--dry-run", "--eval-reward", "course.py:none"))
    assert said.startswith("--eval-reward: ")
    write(place / "held.txt", "word " * 900)
    said = fails_in_a_line(capsys, *evaluated("--dry-run"))
    assert said.startswith("evaluation: ")


def test_samples_have_their_tokens(place):
    main(arguments(critic="head"))
    rows = lines(place / "run/samples.jsonl")
    for row in rows:
        tokens = row["tokens"]
        assert tokens.keys() == {"text", "log_ratio", "value", "advantage"}
        assert len({len(part) for part in tokens.values()}) == 1
        assert "".join(tokens["text"]).startswith(row["completion"])
