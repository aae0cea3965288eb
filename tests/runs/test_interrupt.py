"""Ctrl-C and errors amid PPOTrainer.train: the run stops, and what was trained is kept."""

from __future__ import annotations

import signal
import threading

import pytest
import torch
from tiny_trainer import PROMPTS, changed, count_letters, names, tiny_trainer, weights

from ppo_fast.checkpointing import checkpoint
from ppo_fast.runs.checkpoints import Checkpoints

QUIET = {"progress": False}

# Ctrl-C


def ctrl_c_at(step, times=1):
    """A reward that is interrupted in one step."""
    calls = []

    def reward(prompts, completions):
        calls.append(1)
        if len(calls) == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return count_letters(prompts, completions)

    return reward


@pytest.fixture
def handler():
    """The handler of SIGINT, which must be the same before and after the test."""
    before = signal.getsignal(signal.SIGINT)
    yield before
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_finishes_the_step_and_keeps_it(tmp_path, handler, caplog):
    undisturbed = tiny_trainer()
    undisturbed.train(PROMPTS, num_steps=2, batch_size=2, **QUIET)
    trainer = tiny_trainer(ctrl_c_at(2))
    result = trainer.train(PROMPTS, num_steps=9, batch_size=2, checkpoint_dir=tmp_path, **QUIET)
    assert result["interrupted"] is True
    assert len(result["training_history"]["mean_rewards"]) == 2
    assert trainer.stats == undisturbed.stats
    assert not changed(trainer.policy_model, weights(undisturbed.policy_model))
    assert names(tmp_path) == ["ppo_checkpoint_step_2.pt"]
    said = caplog.text
    assert "Ctrl-C" in said
    assert str(tmp_path / "ppo_checkpoint_step_2.pt") in said
    assert "step 2" in said
    fresh = tiny_trainer()
    assert fresh.load_checkpoint(tmp_path / "ppo_checkpoint_step_2.pt") == 2
    assert not changed(fresh.policy_model, weights(trainer.policy_model))


def test_ctrl_c_between_steps(tmp_path, handler):
    trainer = tiny_trainer()
    result = trainer.train(
        PROMPTS,
        num_steps=9,
        batch_size=2,
        checkpoint_dir=tmp_path,
        on_step=lambda step: signal.raise_signal(signal.SIGINT),
        **QUIET,
    )
    assert result["interrupted"] is True
    assert names(tmp_path) == ["ppo_checkpoint_step_1.pt"]


def test_ctrl_c_without_a_folder_says_where_the_weights_are(handler, caplog):
    trainer = tiny_trainer(ctrl_c_at(1))
    result = trainer.train(PROMPTS, num_steps=9, batch_size=2, **QUIET)
    assert result["interrupted"] is True
    assert "the weights are in the policy" in caplog.text


def test_ctrl_c_finishes_the_write_in_hand(tmp_path, handler, monkeypatch):
    write = torch.save

    def interrupted_write(*args):
        signal.raise_signal(signal.SIGINT)
        write(*args)

    monkeypatch.setattr(torch, "save", interrupted_write)
    trainer = tiny_trainer()
    # the write when stopping would be interrupted again: the second Ctrl-C
    monkeypatch.setattr(Checkpoints, "keep", lambda *args: None)
    result = trainer.train(
        PROMPTS, num_steps=9, batch_size=2, checkpoint_dir=tmp_path, checkpoint_freq=2, **QUIET
    )
    assert result["interrupted"] is True
    assert names(tmp_path) == ["ppo_checkpoint_step_2.pt"]
    assert checkpoint.load(tmp_path / "ppo_checkpoint_step_2.pt")["step"] == 2


def test_second_ctrl_c_stops_at_once(tmp_path, handler):
    trainer = tiny_trainer(ctrl_c_at(3, times=2))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(
            PROMPTS, num_steps=9, batch_size=2, checkpoint_dir=tmp_path, checkpoint_freq=1, **QUIET
        )
    assert names(tmp_path) == ["ppo_checkpoint_step_1.pt", "ppo_checkpoint_step_2.pt"]
    assert trainer.stats["total_steps"] == 2


def test_second_ctrl_c_in_a_write_leaves_no_partial_file(tmp_path, handler, monkeypatch):
    trainer = tiny_trainer()
    trainer.train(PROMPTS, 1, 2, checkpoint_dir=tmp_path, checkpoint_freq=1, **QUIET)
    before = (tmp_path / "ppo_checkpoint_step_1.pt").read_bytes()

    def broken_off(payload, file):
        file.write(b"half of a checkpoint")
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(torch, "save", broken_off)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(PROMPTS, 9, 2, checkpoint_dir=tmp_path, checkpoint_freq=1, **QUIET)
    assert names(tmp_path) == ["ppo_checkpoint_step_1.pt"]
    assert (tmp_path / "ppo_checkpoint_step_1.pt").read_bytes() == before


def test_handler_of_the_user_comes_back(handler):
    mine = lambda number, frame: None  # noqa: E731
    signal.signal(signal.SIGINT, mine)
    try:
        tiny_trainer().train(PROMPTS, 1, 2, **QUIET)
        assert signal.getsignal(signal.SIGINT) is mine
        with pytest.raises(RuntimeError):
            tiny_trainer(failing_at(1)).train(PROMPTS, 1, 2, **QUIET)
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, handler)


def test_trains_outside_the_main_thread(handler):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(tiny_trainer().train(PROMPTS, 1, 2, **QUIET))
    )
    thread.start()
    thread.join()
    assert results[0]["interrupted"] is False


# Errors


def failing_at(step):
    calls = []

    def reward(prompts, completions):
        calls.append(1)
        if len(calls) == step:
            raise ConnectionError("the judge is asleep")
        return count_letters(prompts, completions)

    return reward


def test_an_error_keeps_what_was_trained(tmp_path, handler, caplog):
    undisturbed = tiny_trainer()
    undisturbed.train(PROMPTS, num_steps=2, batch_size=2, **QUIET)
    trainer = tiny_trainer(failing_at(3))
    with pytest.raises(RuntimeError, match="the judge is asleep") as caught:
        trainer.train(PROMPTS, num_steps=9, batch_size=2, checkpoint_dir=tmp_path, **QUIET)
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert names(tmp_path) == ["ppo_checkpoint_step_2.pt"]
    said = caplog.text
    assert "step 2" in said
    assert str(tmp_path / "ppo_checkpoint_step_2.pt") in said
    fresh = tiny_trainer()
    assert fresh.load_checkpoint(tmp_path / "ppo_checkpoint_step_2.pt") == 2
    assert not changed(fresh.policy_model, weights(undisturbed.policy_model))


def test_going_on_after_an_error_repeats_the_step(tmp_path):
    undisturbed = tiny_trainer()
    expected = undisturbed.train(PROMPTS, num_steps=4, batch_size=2, **QUIET)
    trainer = tiny_trainer(failing_at(3))
    with pytest.raises(RuntimeError):
        trainer.train(PROMPTS, num_steps=4, batch_size=2, checkpoint_dir=tmp_path, **QUIET)
    resumed = tiny_trainer()
    resumed.load_checkpoint(tmp_path / "ppo_checkpoint_step_2.pt")
    for again in (trainer, resumed):  # the same trainer, and one from the checkpoint
        found = again.train(PROMPTS, num_steps=2, batch_size=2, **QUIET)
        history = found["training_history"]["mean_rewards"]
        assert history == expected["training_history"]["mean_rewards"][2:]
        assert not changed(again.policy_model, weights(undisturbed.policy_model))


def test_an_error_before_the_first_step_writes_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="asleep"):
        tiny_trainer(failing_at(1)).train(PROMPTS, 9, 2, checkpoint_dir=tmp_path, **QUIET)
    assert names(tmp_path) == []


def test_an_error_of_on_step_keeps_what_was_trained(tmp_path):
    def full_disk(step):
        raise OSError("no space left")

    trainer = tiny_trainer()
    with pytest.raises(OSError, match="no space left"):
        trainer.train(PROMPTS, 9, 2, checkpoint_dir=tmp_path, on_step=full_disk, **QUIET)
    assert names(tmp_path) == ["ppo_checkpoint_step_1.pt"]


def test_an_error_amid_an_update_leaves_the_checkpoint_of_its_step(tmp_path, monkeypatch):
    trainer = tiny_trainer()
    arguments = {"batch_size": 2, "checkpoint_dir": tmp_path, "checkpoint_freq": 1, **QUIET}
    trainer.train(PROMPTS, num_steps=1, **arguments)
    (file,) = tmp_path.glob("*.pt")
    whole = file.read_bytes()

    def half_an_update(*args, **kwargs):
        next(trainer.policy_model.parameters()).data.zero_()
        raise FloatingPointError("nan")

    monkeypatch.setattr("ppo_fast.learning.learner.Learner._train_on", half_an_update)
    with pytest.raises(FloatingPointError):
        trainer.train(PROMPTS, num_steps=1, **arguments)
    assert file.read_bytes() == whole


def test_a_file_of_another_run_does_not_count_as_written(tmp_path, handler):
    stale = tmp_path / "ppo_checkpoint_step_1.pt"
    stale.write_bytes(b"of another run")
    trainer = tiny_trainer(failing_at(2))
    with pytest.raises(RuntimeError):
        trainer.train(PROMPTS, num_steps=3, batch_size=2, checkpoint_dir=tmp_path, **QUIET)
    assert tiny_trainer().load_checkpoint(stale) == 1
