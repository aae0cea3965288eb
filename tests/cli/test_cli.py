"""ppo-fast, from the command line to the files of a run."""

from __future__ import annotations

import os
import re
from dataclasses import fields

import pytest
import torch
import yaml
from command_line import PROMPTS, arguments, fails, fails_in_a_line, flat, help_of, lines, write
from tiny_models import VOCAB_SIZE, tiny_classifier, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_fast import PPOConfig
from ppo_fast.cli.main import main
from ppo_fast.cli.train import Train
from ppo_fast.run_folder.folder import RunFolder

# A run


def test_train_fills_the_output_folder(place, capsys):
    main(arguments("--checkpoint-freq", "1"))
    run = place / "run"
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "metrics.jsonl",
        "samples.jsonl",
        "config.yaml",
        "checkpoints",
        "policy",
        "report.html",
        "results.json",
    }
    metrics = lines(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    named = {"policy_loss", "value_loss", "kl_divergence", "mean_reward", "mean_advantage"}
    assert all(named <= row.keys() for row in metrics)
    samples = lines(run / "samples.jsonl")
    assert [row["step"] for row in samples] == [1, 1, 2, 2]
    assert {row["prompt"] for row in samples} <= set(PROMPTS)
    for row in samples:
        assert row["score"] == pytest.approx(len(row["completion"]) / 10)
    means = [sum(r["score"] for r in samples if r["step"] == n) / 2 for n in (1, 2)]
    assert [row["mean_reward"] for row in metrics] == pytest.approx(means, rel=1e-5)
    settings = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    assert settings["learning_rate"] == 0.001
    assert settings["policy"] == "model"
    assert {field.name for field in fields(PPOConfig)} <= settings.keys()
    assert {path.name for path in (run / "checkpoints").glob("*.pt")} == {
        "ppo_checkpoint_step_1.pt",
        "ppo_checkpoint_step_2.pt",
    }
    out = capsys.readouterr().out
    assert len(re.findall(r"^step +[12]  reward", out, re.MULTILINE)) == 2
    assert "trained policy: run/policy" in out

    trained = AutoModelForCausalLM.from_pretrained("run/policy")
    start = AutoModelForCausalLM.from_pretrained("model")
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)
    saved = torch.load(run / "checkpoints/ppo_checkpoint_step_2.pt", weights_only=True)
    for name, weight in trained.state_dict().items():
        assert torch.equal(weight, saved["models"]["policy"][name])
    assert AutoTokenizer.from_pretrained("run/policy")("The film") == tiny_tokenizer()("The film")


def test_options_of_several_values_and_steps_that_train_the_critic_alone(place, capsys):
    flags = "--critic head --critic-warmup-steps 1 --lr-warmup 3 --importance truncate"
    main(arguments(*flags.split(), "--importance-range", "0.5", "2", "--frozen", "*mlp*", "*norm*"))
    metrics = lines(place / "run" / "metrics.jsonl")
    assert [row["policy_loss"] == 0 for row in metrics] == [True, False]
    settings = yaml.safe_load((place / "run" / "config.yaml").read_text("utf-8"))
    assert settings["importance_range"] == [0.5, 2.0]
    assert settings["frozen"] == ["*mlp*", "*norm*"]
    assert len(re.findall(r"^step +[12]  reward", capsys.readouterr().out, re.MULTILINE)) == 2
    main(["train", "--config", "run/config.yaml", "--resume", "--num-steps", "3"])
    assert len(lines(place / "run" / "metrics.jsonl")) == 3


def test_value_model_and_flags_reach_the_trainer(place):
    main(arguments("--value-model", "model", "--temperature", "0.5", num_steps=1))
    saved = torch.load("run/checkpoints/ppo_checkpoint_step_1.pt", weights_only=True)
    assert saved["models"].keys() == {"policy", "value"}
    assert "value_head.0.weight" in saved["models"]["value"]
    assert yaml.safe_load((place / "run/config.yaml").read_text())["temperature"] == 0.5


def test_a_tokenizer_without_a_pad_token_pads_with_eos(place):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained("model")
    assert AutoTokenizer.from_pretrained("model").pad_token is None
    main(arguments(num_steps=1))
    assert len(lines(place / "run/metrics.jsonl")) == 1


def test_a_classifier_scores(place):
    classifier = tiny_classifier(vocab_size=VOCAB_SIZE, layers=1, hidden=32)
    classifier.save_pretrained("judge")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained("judge")
    main(arguments(reward="judge", num_steps=1))
    for row in lines(place / "run/samples.jsonl"):
        ids = tokenizer(row["prompt"] + row["completion"], return_tensors="pt")
        with torch.no_grad():
            expected = classifier(**ids).logits.item()
        assert row["score"] == pytest.approx(expected, rel=1e-3, abs=1e-4)


# --resume


def test_resume_goes_on_as_if_it_had_not_stopped(place):
    main(arguments(output_dir="whole", num_steps=3, critic="head"))
    main(arguments(output_dir="parts", num_steps=1, critic="head"))
    main(arguments("--resume", output_dir="parts", num_steps=3, critic="head"))
    whole, parts = (lines(place / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert [row["step"] for row in parts] == [1, 2, 3]
    timed = ("time", "perf/")
    for expected, found in zip(whole, parts, strict=True):
        assert {k: v for k, v in expected.items() if not k.startswith(timed)} == {
            k: v for k, v in found.items() if not k.startswith(timed)
        }
    assert lines(place / "whole/samples.jsonl") == lines(place / "parts/samples.jsonl")
    folders = [place / name / "policy" for name in ("whole", "parts")]
    policies = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    for a, b in zip(*(policy.state_dict().values() for policy in policies), strict=True):
        assert torch.equal(a, b)


def test_a_second_run_in_the_folder_is_refused(place, capsys):
    main(arguments(num_steps=1))
    files = [place / "run/metrics.jsonl", place / "run/config.yaml"]
    before = [file.read_bytes() for file in files]
    capsys.readouterr()
    said = fails_in_a_line(capsys, *arguments())
    assert re.search(r"--output-dir: run holds a run .*step_1\.pt.*--resume.*another folder", said)
    main(arguments("--resume", num_steps=1))
    assert "nothing is left to do: all 1 steps are done" in capsys.readouterr().out
    assert [file.read_bytes() for file in files] == before


def test_folders_with_brackets_in_their_names(place, capsys):
    (place / "model").rename(place / "m[red]")
    options = {"output_dir": "o[/]ut [red]", "policy": "m[red]"}
    main(arguments(num_steps=1, **options))
    main(arguments("--resume", num_steps=2, **options))
    shown = capsys.readouterr().out
    checkpoint = "o[/]ut [red]/checkpoints/ppo_checkpoint_step_1.pt"
    assert f"resumed {checkpoint} after step 1\n" in shown
    assert shown.count("trained policy: o[/]ut [red]/policy\n") == 2
    main(["env", "--policy", "m[red]"])
    assert "m[red]" in capsys.readouterr().out


def test_a_run_in_use_is_refused_before_models_are_loaded(place, capsys):
    (place / "model/model.safetensors").unlink()  # loading would fail
    with RunFolder(place / "run"):
        said = fails_in_a_line(capsys, *arguments())
    assert said.startswith(f"--output-dir: run is in use by another run, process {os.getpid()} ")
    assert not (place / "run/config.yaml").exists()


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": None}, "--policy: is required"),
        ({"prompts": None}, "--prompts: is required"),
        ({"reward": None}, "--reward: is required"),
        ({"prompts": "no.txt"}, "--prompts: no file no.txt"),
        ({"policy": "./no_such_model"}, "--policy: no folder ./no_such_model"),
        ({"value_model": "a/b/c"}, "--value-model: no folder a/b/c"),
        ({"reward": "./no_such_judge"}, "--reward: no folder ./no_such_judge"),
        ({"reward": "no_such_module_here:f"}, "No module named 'no_such_module_here'"),
        (
            {"reward": "my_reward:lenght"},
            "--reward: module my_reward has no function 'lenght'; did you mean length?",
        ),
        ({"reward": "my_reward:number"}, "--reward: module my_reward has no function 'number'"),
        ({"num_steps": 0}, "--num-steps: got 0, expected a whole number of at least 1"),
        ({"batch_size": 0}, "--batch-size: got 0, expected a whole number of at least 1"),
        ({"max_length": 126}, "that exceeds policy_model's context of 128"),
        ({"value_model": "model", "critic": "head"}, "--value-model: got ValueModel"),
    ],
)
def test_bad_flags(place, capsys, changes, message):
    assert message in fails_in_a_line(capsys, *arguments(**changes))


def test_a_reward_that_raises(place, capsys):
    write(place / "my_reward.py", "def length(prompts, completions):\n    return 1 / 0\n")
    said = fails(capsys, *arguments())
    assert "ppo-fast: reward_model length raised ZeroDivisionError" in said


def test_traceback_on_request(place, monkeypatch):
    monkeypatch.setenv("PPO_FAST_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="no file"):
        main(arguments(prompts="no.txt"))


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("--lerning-rate", "--learning-rate"), ("--gama", "--gamma"), ("--num-step", "--num-steps")],
)
def test_an_unknown_flag_names_the_nearest(place, capsys, wrong, nearest):
    said = fails_in_a_line(capsys, *arguments(wrong, "0.5"))
    assert said == f"no flag {wrong} of train; did you mean {nearest}?"


def test_an_unknown_flag_beside_a_config_file(place, capsys):
    write(place / "run.yaml", "gamma: 0.9")
    said = fails_in_a_line(capsys, "train", "--config", "run.yaml", "--gama", "0.5")
    assert said == "no flag --gama of train; did you mean --gamma?"


def test_flags_out_of_range(place, capsys):
    assert "gamma: got 2.0, expected a number in [0, 1]" in flat(fails(capsys, *arguments(gamma=2)))


def test_every_field_of_the_config_is_a_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    flags = set(re.findall(r"^[│ ] +(--[a-z-]+)", help_of(capsys, "train"), re.MULTILINE))
    names = {field.name for field in fields(PPOConfig)}
    names |= {field.name for field in fields(Train)} - {"ppo"}
    assert {"--" + name.replace("_", "-") for name in names} <= flags


def test_commands_are_listed(capsys):
    assert {"train", "demo", "env", "doctor"} <= set(help_of(capsys).split())


def test_a_dry_run_shows_the_run_and_writes_nothing(place, capsys):
    main(arguments("--dry-run", "--critic", "head"))
    out = flat(capsys.readouterr().out)
    assert "memory of a run in GB" in out
    assert any(prompt in out for prompt in PROMPTS)
    assert "3 prompts, 0 held out; rewards: length. Nothing was trained or written." in out
    assert not (place / "run").exists()
    said = fails_in_a_line(capsys, *arguments("--dry-run", "--max-prompt-length", "1"))
    assert "which exceeds max_prompt_length=1" in said


def test_a_dry_run_draws_the_prompts_of_the_first_step(place, capsys):
    main(arguments("--dry-run", "--critic", "head", batch_size=1))
    shown = flat(capsys.readouterr().out)
    main(arguments("--critic", "head", batch_size=1, num_steps=1))
    (row,) = lines(place / "run/samples.jsonl")
    assert row["prompt"] in shown
    assert sum(prompt in shown for prompt in PROMPTS) == 1
