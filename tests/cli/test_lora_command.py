"""``ppo-fast train --lora-rank``: adapters on the way, a plain model at the end."""

from __future__ import annotations

import sys

import pytest
import torch
from tiny_adapters import base_model, split_names
from tiny_batch import batch
from tiny_models import tiny_tokenizer
from tiny_trainer import PROMPTS, true_logprobs
from transformers import AutoModelForCausalLM

from ppo_fast.cli import main
from ppo_fast.exports import export
from ppo_fast.models.adapters import adapted_layers

TOKENS = batch()


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The arguments of a run of two steps."""
    monkeypatch.chdir(tmp_path)
    base_model().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    (tmp_path / "letters.py").write_text("from tiny_trainer import count_letters\n")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = "--policy model --prompts prompts.txt --reward letters:count_letters --num-steps 2"
    more = "--max-length 6 --learning-rate 0.01 --critic head --device cpu --lora-rank 4"
    return ["train", *flags.split(), *more.split()]


@pytest.mark.parametrize("k", [None, 1])
def test_the_command_writes_a_whole_plain_model(command, tmp_path, monkeypatch, k):
    policies, save = [], export.export_policy

    def saving(*arguments, **options):
        policies.append(arguments[0])
        return save(*arguments, **options)

    monkeypatch.setattr(export, "export_policy", saving)
    main.main([*command, *([] if k is None else ["--num-layers-unfrozen", str(k)])])
    (policy,) = policies
    assert len({name.split(".layers.")[1][0] for name in split_names(policy)[0]}) == (k or 3)
    folder = tmp_path / "runs" / "train" / "policy"
    assert not (folder / "adapter_config.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert not list(adapted_layers(loaded))
    assert loaded.state_dict().keys() == base_model().state_dict().keys()
    found, expected = true_logprobs(loaded, TOKENS), true_logprobs(policy, TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (true_logprobs(base_model(), TOKENS) - expected).abs().max() > 1e-3


def test_without_peft_the_error_names_the_extra(command, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit):
        main.main(command)
    assert "LoRA needs peft: pip install 'ppo_fast[lora]'" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["3", "4"])
def test_equal_seeds_train_equal_weights(command, tmp_path, seed):
    """New adapters and value heads are drawn from the seed too."""
    command = [flag for flag in command if flag not in ("--critic", "head")]
    base_model().save_pretrained("values")
    for run, before in (("one", 1), ("two", 2)):
        torch.manual_seed(before)  # whatever was drawn in the process before
        main.main(
            [*command, "--value-model", "values", "--seed", seed, "--output-dir", run]
        )  # fmt: skip
    one, two = (
        torch.load(tmp_path / run / "checkpoints" / "ppo_checkpoint_step_2.pt")
        for run in ("one", "two")
    )
    for name, weights in one["models"].items():
        for weight, tensor in weights.items():
            assert torch.equal(tensor, two["models"][name][weight]), (name, weight)
