"""Checkpoints: bit for bit, whole or not at all, and never executed."""

from __future__ import annotations

import os
import pickle
import random

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_trainer import (
    PROMPTS,
    changed,
    count_letters,
    tiny_trainer,
    tiny_value_model,
    weights,
    without_times,
)
from torch import nn
from whole_state import assert_is, everything, noisy_reward, trained

from ppo_fast import PPOConfig, PPOTrainer
from ppo_fast.checkpointing import checkpoint

CRITICS = ["model", "head", "top", "baseline"]


def of_critic(critic):
    """Return the trainer's options for this critic; a top critic needs a trunk."""
    return {"critic": critic} | ({"num_layers_unfrozen": 1} if critic == "top" else {})


# What comes back


@pytest.mark.parametrize("critic", CRITICS)
def test_everything_comes_back_bit_for_bit(tmp_path, critic):
    trainer = trained(2, **of_critic(critic))
    path = trainer.save_checkpoint(tmp_path, 2)
    assert path == tmp_path / "ppo_checkpoint_step_2.pt"
    saved = everything(trainer)
    other = trained(1, **of_critic(critic))
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    assert other.load_checkpoint(str(path)) == 2
    assert_is(other, saved)
    assert saved["policy_optimizer"][0], "AdamW has a state to come back"


@pytest.mark.parametrize("options", [{}, {"num_minibatches": 2, "num_layers_unfrozen": 1}])
@pytest.mark.parametrize("critic", CRITICS)
def test_a_resumed_run_is_the_run_without_the_stop(tmp_path, critic, options):
    def train(trainer, steps):
        seen = []
        trainer.train(PROMPTS, steps, 2, progress=False, on_step=seen.append)
        return [without_times(step.metrics) for step in seen]

    whole = tiny_trainer(noisy_reward, **(of_critic(critic) | options))
    expected = train(whole, 4)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    before = tiny_trainer(noisy_reward, **(of_critic(critic) | options))
    found = train(before, 2)
    path = before.save_checkpoint(tmp_path, 2)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    torch.manual_seed(99)
    after = tiny_trainer(noisy_reward, **(of_critic(critic) | options))
    after.load_checkpoint(path)
    found += train(after, 2)
    assert found == expected
    assert_is(after, everything(whole))
    assert after.get_statistics() == whole.get_statistics()


def test_the_file_is_one_that_weights_only_reads(tmp_path):
    trainer = trained()
    path = trainer.save_checkpoint(tmp_path / "new" / "folder", 7)
    payload = torch.load(path, weights_only=True)
    assert payload["format"] == "ppo_fast checkpoint"
    assert payload["version"] == checkpoint.VERSION
    assert payload["step"] == 7
    shapes = payload["identity"]["policy"]["shapes"]
    assert shapes["lm_head.weight"] == [307, 32]
    assert not any(key.startswith("reference_model") for key in payload), "it is the start"


# Whole or not at all


def test_a_failed_replace_leaves_the_old_file(tmp_path, monkeypatch):
    trainer = trained()
    path = trainer.save_checkpoint(tmp_path, 1)
    before = path.read_bytes()
    trainer.train_step(PROMPTS)

    def fail(source, target):
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        trainer.save_checkpoint(tmp_path, 1)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_broken_write_leaves_the_old_file(tmp_path, monkeypatch, error):
    trainer = trained()
    path = trainer.save_checkpoint(tmp_path, 1)
    before = path.read_bytes()

    def fail(payload, file):
        file.write(b"half a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(type(error)):
        trainer.save_checkpoint(tmp_path, 1)
    with pytest.raises(type(error)):
        trainer.save_checkpoint(tmp_path, 2)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# What is refused, and changes nothing


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    return trained().save_checkpoint(tmp_path_factory.mktemp("checkpoint"), 1)


def refused(trainer, path, error, message):
    before = everything(trainer)
    with pytest.raises(error, match=message) as caught:
        trainer.load_checkpoint(path)
    assert str(path) in str(caught.value), "the file is named"
    assert len(str(caught.value).splitlines()) == 1
    assert_is(trainer, before)


def test_no_file(tmp_path):
    refused(tiny_trainer(), tmp_path / "no.pt", FileNotFoundError, "no file")
    refused(tiny_trainer(), tmp_path, FileNotFoundError, "no file")


@pytest.mark.parametrize("part", [0.0, 0.2, 0.9, 0.999])
def test_a_truncated_file(tmp_path, file, part):
    content = file.read_bytes()
    path = tmp_path / "short.pt"
    path.write_bytes(content[: int(len(content) * part)])
    refused(trained(), path, ValueError, r"cannot be read \(\w+\); it is truncated, damaged or not")


def test_random_bytes(tmp_path):
    path = tmp_path / "noise.pt"
    path.write_bytes(random.Random(3).randbytes(5000))
    refused(trained(), path, ValueError, r"cannot be read \(\w+\); it is truncated, damaged or not")


@pytest.mark.parametrize(
    "content", [{"weight": torch.ones(3)}, torch.ones(2), [1, 2], {"format": "another"}]
)
def test_a_torch_file_that_is_not_ours(tmp_path, content):
    path = tmp_path / "theirs.pt"
    torch.save(content, path)
    refused(trained(), path, ValueError, "was not written by ppo_fast")


def test_a_newer_version(tmp_path, file):
    payload = torch.load(file, weights_only=True)
    path = tmp_path / "newer.pt"
    torch.save(payload | {"version": checkpoint.VERSION + 1}, path)
    refused(trained(), path, ValueError, r"version 4, this ppo_fast reads up to 3; update it")


def test_another_policy_names_the_first_weight_that_differs(file):
    wider = PPOTrainer(
        tiny_model(hidden=64), tiny_value_model(), count_letters, tiny_tokenizer(), "cpu"
    )
    refused(
        wider,
        file,
        ValueError,
        r"another policy: lm_head\.weight has shape \[307, 32\] in the file and \[307, 64\]",
    )
    deeper = tiny_trainer(layers=3)
    refused(deeper, file, ValueError, r"another policy: model\.layers\.2\.\S+ has shape None")
    family = PPOTrainer(
        tiny_model("gpt2", hidden=32), tiny_value_model(), count_letters, tiny_tokenizer(), "cpu"
    )
    refused(family, file, ValueError, r"policy of class LlamaForCausalLM.*GPT2LMHeadModel")


def test_another_value_model(file):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Embedding(307, 1)

        def forward(self, input_ids, attention_mask):
            return self.value(input_ids).squeeze(-1)

    trainer = PPOTrainer(tiny_model(hidden=32), Other(), count_letters, tiny_tokenizer(), "cpu")
    refused(trainer, file, ValueError, r"value of class ValueModel, the trainer's is Other")


def test_another_critic(tmp_path, file):
    refused(
        tiny_trainer(critic="baseline"),
        file,
        ValueError,
        r"holds \['policy', 'value'\], the trainer has \['policy'\].*same critic",
    )
    refused(tiny_trainer(critic="head"), file, ValueError, r"value of class ValueModel.*ValueHead")
    alone = trained(critic="baseline").save_checkpoint(tmp_path, 1)
    refused(trained(), alone, ValueError, r"holds \['policy'\], the trainer has \['policy', 'v")


def test_other_trained_layers(file):
    message = r"21 tensors in the optimizer of the policy, .* has 11; .* num_layers_unfrozen"
    refused(trained(num_layers_unfrozen=1), file, ValueError, message)


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("kind", ["pickle", "torch", "inside"])
def test_nothing_in_a_file_is_executed(tmp_path, file, kind):
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(marker), protocol=2))
    elif kind == "torch":
        torch.save(Payload(marker), path)
    else:
        torch.save(torch.load(file, weights_only=True) | {"stats": Payload(marker)}, path)
    trainer = trained()
    refused(trainer, path, ValueError, "cannot be read")
    with pytest.raises(ValueError, match="cannot be read") as caught:
        trainer.load_checkpoint(path)
    assert "weights_only" not in str(caught.value), "torch's advice would let it execute"
    assert not marker.exists()
    if kind == "torch":
        torch.load(path, weights_only=False)
        assert marker.exists(), "the file does execute where it is let"


def test_another_reference_warns(file):
    same_start = tiny_trainer()
    same_start.load_checkpoint(file)
    drifted = PPOTrainer(
        tiny_model(hidden=32, seed=5),
        tiny_value_model(),
        count_letters,
        tiny_tokenizer(),
        "cpu",
        config=PPOConfig(),
    )
    with pytest.warns(UserWarning, match="another reference model") as caught:
        drifted.load_checkpoint(file)
    assert str(file) in str(caught[0].message)
    assert not changed(drifted.policy_model, weights(same_start.policy_model)), "it is loaded"


def test_another_seed_warns(file):
    with pytest.warns(UserWarning, match="trained with seed 0, the trainer's is 7"):
        tiny_trainer(seed=7).load_checkpoint(file)


def test_numbers_of_numpy_are_read_back(tmp_path):
    """torch's safe loader reads Python's numbers alone."""
    numbers = {
        "learning_rate": np.float64(1e-3),
        "weight_decay": np.float32(0.25),
        "adam_betas": [np.float64(0.8), np.float32(0.5)],
        "seed": np.int64(3),
        "num_epochs": np.int32(1),
        "whiten_advantages": np.bool_(True),
    }
    trainer = tiny_trainer(**numbers)
    assert trainer.config == tiny_trainer(**{k: _plain(v) for k, v in numbers.items()}).config
    assert type(trainer.config.weight_decay) is float
    assert type(trainer.config.seed) is int
    trainer.train_step(PROMPTS, max_length=np.int64(4), temperature=np.float32(1))
    path = trainer.save_checkpoint(tmp_path, np.int64(1))
    again = tiny_trainer(**numbers)
    assert again.load_checkpoint(path) == 1
    assert not changed(again.policy_model, weights(trainer.policy_model))


def _plain(value):
    return tuple(x.item() for x in value) if isinstance(value, list) else value.item()


@pytest.mark.parametrize("schedule", ["ExponentialLR", "CosineAnnealingLR"])
def test_a_schedule_goes_on_where_it_was(tmp_path, schedule):
    def made():
        trainer = tiny_trainer(critic="head", learning_rate=1e-3)
        scheduler = {
            "ExponentialLR": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
            "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        }[schedule](trainer.policy_optimizer)
        return trainer, scheduler

    trainer, scheduler = made()
    rates = []
    for step in range(5):
        trainer.train_step(PROMPTS)
        scheduler.step()
        rates.append(trainer.policy_optimizer.param_groups[0]["lr"])
        if step == 2:
            path, state = trainer.save_checkpoint(tmp_path, 3), scheduler.state_dict()
    again, scheduler = made()
    again.load_checkpoint(path)
    scheduler.load_state_dict(state)
    for rate in rates[3:]:
        again.train_step(PROMPTS)
        scheduler.step()
        assert again.policy_optimizer.param_groups[0]["lr"] == rate
    assert not changed(again.policy_model, weights(trainer.policy_model))


def test_without_a_schedule_the_rate_is_that_of_the_config(tmp_path):
    path = tiny_trainer(learning_rate=1e-3).save_checkpoint(tmp_path, 1)
    again = tiny_trainer(learning_rate=5e-4)
    again.load_checkpoint(path)
    assert again.policy_optimizer.param_groups[0]["lr"] == 5e-4
