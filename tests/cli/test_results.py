"""What ppo-fast train leaves, and that it loads without ppo_fast."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from command_line import arguments, fails, fails_in_a_line
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from ppo_fast.cli.main import main
from ppo_fast.cli.results import results_are_saved
from ppo_fast.exports.model_card import ModelCard


def test_a_card_says_how_the_policy_was_trained(place, monkeypatch):
    argv = arguments("--critic", "head")
    monkeypatch.setattr("sys.argv", ["ppo-fast", *argv])
    main(argv)
    card = (place / "run/policy/README.md").read_text("utf-8")
    assert "ppo-fast train --policy model" in card
    assert "prompts.txt" in card
    assert "learning_rate" in card
    assert "library_name: transformers" in card
    AutoModelForCausalLM.from_pretrained("run/policy")
    weights = load_file("run/critic/model.safetensors")
    assert {tuple(w.shape) for w in weights.values()} == {(1, 32), (1,)}
    assert json.loads((place / "run/critic/config.json").read_text())["hidden_size"] == 32


def test_a_whole_critic_is_a_token_classifier(place):
    main(arguments("--critic", "head", "--save-critic", "whole"))
    model = AutoModelForTokenClassification.from_pretrained("run/critic")
    assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 1)


@pytest.mark.parametrize("flags", [["--save-critic", "none"], []])
def test_no_critic_where_there_is_none_or_none_is_wanted(place, flags):
    critic = "head" if flags else "baseline"
    main(arguments("--critic", critic, *flags))
    assert not (place / "run/critic").exists()


@pytest.mark.parametrize("flags", [["--adapter-only"], ["--quantization", "8bit"]])
def test_an_adapter_is_saved_alone(place, capsys, flags):
    peft = pytest.importorskip("peft")
    if "8bit" in flags:
        pytest.importorskip("bitsandbytes")
    main(arguments("--critic", "head", "--lora-rank", "2", *flags))
    assert "trained adapter: run/policy" in capsys.readouterr().out
    assert not (place / "run/policy/model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained("model")
    peft.PeftModel.from_pretrained(base, "run/policy")
    # and the run goes on from its checkpoint
    main(["train", "--config", "run/config.yaml", "--resume", "--num-steps", "3"])


def test_the_policy_is_pushed(place, monkeypatch, capsys):
    pushed = []

    def push(folder, repo_id):
        pushed.append((sorted(path.name for path in folder.iterdir()), repo_id))
        return "https://hub/me/kind"

    monkeypatch.setattr("ppo_fast.exports.hub.push_to_hub", push)
    main(arguments("--push-to-hub", "me/kind"))
    ((files, name),) = pushed
    assert name == "me/kind"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert "pushed: https://hub/me/kind" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter-only"], "--adapter-only: needs adapters to train; add --lora-rank 16"),
        (["--quantization", "4bit"], "--quantization: needs adapters to train; add --lora-rank"),
        (["--push-to-hub", "no owner"], "--push-to-hub: got 'no owner', expected a name such as"),
    ],
)
def test_bad_flags_of_results(place, capsys, flags, message):
    assert fails_in_a_line(capsys, *arguments(*flags)).startswith(message)


def test_a_whole_critic_is_refused_before_anything_is_trained(place, capsys):
    value = ["--value-model", "model", "--save-critic", "whole"]
    said = fails_in_a_line(capsys, *arguments(*value, critic="model"))
    assert said.startswith("--save-critic: whole is not possible: the head of a ValueModel")
    assert said.endswith("; use --save-critic weights")
    said = fails_in_a_line(capsys, *arguments("--save-critic", "whole", critic="baseline"))
    assert said.startswith("--save-critic: whole is not possible: the critic has no weights")
    assert not (place / "run/metrics.jsonl").exists()


def test_the_card_of_an_adapter_loads_its_base_quantised(place):
    pytest.importorskip("bitsandbytes")
    main(arguments("--critic", "head", "--lora-rank", "2", "--quantization", "4bit"))
    card = (place / "run/policy/README.md").read_text("utf-8")
    code = card.partition("```python")[2].partition("```")[0]
    names = {}
    exec(code.replace("FOLDER", "run/policy"), names)
    assert type(names["base"].model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"


def test_choices_in_a_config_file(place, capsys):
    (place / "run.yaml").write_text("save_critic: all\n")
    said = fails_in_a_line(capsys, *arguments("--config", "run.yaml"))
    assert "save_critic: got 'all', expected one of ('weights', 'whole', 'none')" in said


def test_results_count_as_saved_when_all_are(place, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("ppo_fast.exports.export.export_policy", _full)
        fails_in_a_line(capsys, *arguments("--critic", "head"))
    assert (place / "run/critic/README.md").exists()
    assert not results_are_saved(place / "run", 2, 2)
    main(arguments("--critic", "head", "--resume"))
    assert results_are_saved(place / "run", 2, 2)
    assert not results_are_saved(place / "run", 3, 3)
    assert not results_are_saved(place, 2, 2)


def test_a_card_that_cannot_be_written_leaves_the_policy_of_before(place, monkeypatch, capsys):
    main(arguments())
    before = (place / "run/policy/model.safetensors").read_bytes()
    monkeypatch.setattr(ModelCard, "write", _full)
    assert "No space left" in fails(capsys, *arguments("--resume", num_steps=3))
    assert (place / "run/policy/model.safetensors").read_bytes() == before
    assert (place / "run/policy/README.md").exists()


def _full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
