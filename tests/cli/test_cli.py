"""ppo-fast, from the command line to the files of a run."""

from __future__ import annotations

import json
import re
from dataclasses import fields

import pytest
import torch
import yaml
from tiny_models import VOCAB_SIZE, tiny_classifier, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_fast import PPOConfig
from ppo_fast.cli.config_file import read_config
from ppo_fast.cli.main import main, parse
from ppo_fast.cli.train import Train
from ppo_fast.data.prompts import read_prompts
from ppo_fast.ops.backends.impls import COMPILED
from ppo_fast.runs.folder import newest_checkpoint

PROMPTS = ["The film was", "She thought", "Nothing in this room"]
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


# A run


def test_train_fills_the_output_folder(place, capsys):
    main(arguments("--checkpoint-freq", "1"))
    run = place / "run"
    assert {path.name for path in run.iterdir()} == {
        "metrics.jsonl",
        "samples.jsonl",
        "config.yaml",
        "checkpoints",
        "policy",
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
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
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


# Prompts


def write(path, text):
    path.write_text(text, "utf-8")
    return path


def test_prompts_of_every_format(tmp_path):
    odd = 'one "quoted", \u2028 with\x85breaks'
    records = [{"prompt": text, "more": 1} for text in ("ä b", odd, "last")]
    jsonl = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    assert read_prompts(write(tmp_path / "a.jsonl", jsonl)) == ["ä b", odd, "last"]
    assert read_prompts(write(tmp_path / "a.txt", f"ä b\n\n{odd}\r\n  \nlast")) == [
        "ä b",
        odd,
        "last",
    ]
    table = f'id,prompt\n1,ä b\n2,"{odd.replace(chr(34), chr(34) * 2)}"\n3,"two\nlines"\n'
    assert read_prompts(write(tmp_path / "a.csv", table)) == ["ä b", odd, "two\nlines"]
    assert read_prompts(write(tmp_path / "b.csv", "\ufeffprompt\nfrom a spreadsheet\n")) == [
        "from a spreadsheet"
    ]


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv"])
def test_train_reads_jsonl_and_csv(place, name):
    if name.endswith("csv"):
        text = "prompt,source\n" + "".join(f"{prompt},book\n" for prompt in PROMPTS)
    else:
        text = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    write(place / name, text)
    main(arguments(prompts=name, num_steps=1, batch_size=3))
    samples = lines(place / "run/samples.jsonl")
    assert sorted(row["prompt"] for row in samples) == sorted(PROMPTS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", "[]", r"--prompts: .*p\.json ends in '\.json', expected \.txt, \.jsonl, \.csv"),
        ("p.txt", "\n  \n", r"--prompts: .*p\.txt holds no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}', r'p\.jsonl line 2 has no "prompt"'),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt"', r"p\.jsonl line 3 is not JSON"),
        ("p.jsonl", '{"prompt": 3}', r'line 1 has no "prompt" that is a string'),
        ("p.csv", "text\na\n", r'p\.csv line 2 has no "prompt"'),
    ],
)
def test_bad_prompts(place, capsys, name, text, message):
    write(place / name, text)
    assert re.search(message, fails_in_a_line(capsys, *arguments(prompts=name)))
    assert not (place / "run").exists()


# --config


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
        ("lerning_rate: 0.1", r"--config: run\.yaml sets 'lerning_rate'.*mean learning_rate\?"),
        ("out_dir: x", r"sets 'out_dir', which is no flag; did you mean output_dir\?"),
        ("qqq: 1", r"sets 'qqq', which is no flag$"),
        ("gamma: 3", r"gamma: got 3, expected a number in \[0, 1\]"),
        ("- a\n- b", r"--config: run\.yaml holds no mapping"),
    ],
)
def test_bad_config_file(place, capsys, text, message):
    write(place / "run.yaml", text)
    assert re.search(message, fails_in_a_line(capsys, "train", "--config", "run.yaml"))


def test_no_config_file(place, capsys):
    assert "--config: no file no.yaml" in fails_in_a_line(capsys, "train", "--config", "no.yaml")


# --resume


def test_resume_goes_on_as_if_it_had_not_stopped(place):
    main(arguments(output_dir="whole", num_steps=3, critic="head"))
    main(arguments(output_dir="parts", num_steps=1, critic="head"))
    main(arguments("--resume", output_dir="parts", num_steps=3, critic="head"))
    whole, parts = (lines(place / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert [row["step"] for row in parts] == [1, 2, 3]
    timed = {"time", "time/rollout", "time/experience", "time/update"}
    for expected, found in zip(whole, parts, strict=True):
        assert {k: v for k, v in expected.items() if k not in timed} == {
            k: v for k, v in found.items() if k not in timed
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
    said = fails_in_a_line(capsys, *arguments("--resume", num_steps=1))
    assert "--num-steps: got 1, expected more than the 1 done" in said
    assert [file.read_bytes() for file in files] == before


def test_newest_checkpoint_is_that_of_the_highest_step(tmp_path):
    assert newest_checkpoint(tmp_path / "not there") is None
    for step in (9, 100, 10):
        (tmp_path / f"ppo_checkpoint_step_{step}.pt").touch()
    assert newest_checkpoint(tmp_path).name == "ppo_checkpoint_step_100.pt"


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
        ({"num_steps": 0}, "--num-steps: got 0, expected more than the 0 done"),
        ({"batch_size": 0}, "batch_size: got 0, expected a whole number of at least 1"),
        ({"max_length": 126}, "that exceeds the model's context of 128"),
        ({"value_model": "model", "critic": "head"}, "value_model: got ValueModel"),
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


def flat(text):
    """Without the boxes and line breaks of a terminal."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("--lerning-rate", "--learning-rate"), ("--gama", "--gamma"), ("--num-step", "--num-steps")],
)
def test_an_unknown_flag_names_the_nearest(place, capsys, wrong, nearest):
    said = flat(fails(capsys, *arguments(wrong, "0.5")))
    assert wrong in said
    assert re.search(rf"Perhaps you meant: .*{nearest} ", said)


def test_an_unknown_flag_beside_a_config_file(place, capsys):
    write(place / "run.yaml", "gamma: 0.9")
    said = flat(fails(capsys, "train", "--config", "run.yaml", "--gama", "0.5"))
    assert re.search(r"Perhaps you meant: .*--gamma ", said)


def test_flags_out_of_range(place, capsys):
    assert "gamma: got 2.0, expected a number in [0, 1]" in flat(fails(capsys, *arguments(gamma=2)))


def help_of(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        main([*argv, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_every_field_of_the_config_is_a_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    flags = set(re.findall(r"^[│ ] +(--[a-z-]+)", help_of(capsys, "train"), re.MULTILINE))
    names = {field.name for field in fields(PPOConfig)}
    names |= {field.name for field in fields(Train)} - {"ppo"}
    assert {"--" + name.replace("_", "-") for name in names} <= flags


def test_commands_are_listed(capsys):
    assert {"train", "demo", "env", "doctor"} <= set(help_of(capsys).split())


# env


def test_env_lists_every_op_and_why(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["env"])
    out = capsys.readouterr().out
    assert torch.__version__ in out
    rows = {}
    for line in out.splitlines():
        cells = [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        if len(cells) == 3:
            rows[cells[0]] = cells[1:]
    assert set(COMPILED) <= set(rows)
    for op in COMPILED:
        implementation, why = rows[op]
        assert implementation in ("reference", "cpp", "triton")
        assert why


def test_env_says_which_fast_paths_a_policy_can_take(place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["env", "--policy", "model"])
    out = flat(capsys.readouterr().out)
    for path in ("fused LM head", "1 of 1 layers fused", "products of few rows"):
        assert f"{path} yes" in out
    assert "frozen trunk no num_layers_unfrozen: got 1" in out, "its one layer is all that there is"
