"""A disk that is full: one line, whole checkpoints, and a run that goes on."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from tiny_trainer import PROMPTS, names, one_line, tiny_trainer

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full_disk(monkeypatch):
    """Let the next writes of checkpoints fail; returns a list with their number."""
    left, save = [0], torch.save

    def writing(contents, file):
        if left[0]:
            left[0] -= 1
            file.write(b"half")
            raise FULL
        save(contents, file)

    monkeypatch.setattr(torch, "save", writing)
    return left


def test_a_checkpoint_that_cannot_be_written(tmp_path, full_disk):
    trainer = tiny_trainer()
    full_disk[0] = 1
    with pytest.raises(OSError, match=r"step_1\.pt cannot be written \(.*No space left") as caught:
        trainer.save_checkpoint(tmp_path, 1)
    assert one_line(caught)
    assert names(tmp_path) == []


def test_torchs_own_error_names_its_cause(tmp_path, monkeypatch):
    """torch's zip writer says "[enforce fail at inline_container.cc:672]"."""

    def writing(contents, file):
        try:
            raise FULL
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . ")  # noqa: B904

    monkeypatch.setattr(torch, "save", writing)
    with pytest.raises(OSError, match=r"cannot be written \(.*No space left on device\); those"):
        tiny_trainer().save_checkpoint(tmp_path, 1)


def test_a_run_goes_on_and_tries_again(tmp_path, full_disk, caplog):
    def fill(step):
        full_disk[0] = 1 if step.number == 2 else 0

    tiny_trainer().train(
        PROMPTS, 3, 2, checkpoint_dir=tmp_path, checkpoint_freq=1, progress=False, on_step=fill
    )
    assert names(tmp_path) == ["ppo_checkpoint_step_1.pt", "ppo_checkpoint_step_3.pt"]
    assert "step_2.pt cannot be written" in caplog.text
    assert "the run goes on, and tries again at the next checkpoint" in caplog.text


def test_a_full_disk_does_not_hide_why_a_run_ends(tmp_path, full_disk, caplog):
    def fail(step):
        if step.number == 2:
            full_disk[0] = 1
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        tiny_trainer().train(
            PROMPTS, 3, 2, checkpoint_dir=tmp_path, checkpoint_freq=1, progress=False, on_step=fail
        )
    assert "stopped by an error in a callback after step 2" in caplog.text
    assert "step_2.pt cannot be written" in caplog.text
    assert "newest checkpoint: " + str(tmp_path / "ppo_checkpoint_step_1.pt") in caplog.text


def test_a_last_checkpoint_that_fails_is_an_error(tmp_path, full_disk):
    def fill(step):
        full_disk[0] = 1 if step.number == 3 else 0

    with pytest.raises(OSError, match=r"step_3\.pt cannot be written"):
        tiny_trainer().train(
            PROMPTS, 3, 2, checkpoint_dir=tmp_path, checkpoint_freq=1, progress=False, on_step=fill
        )
    assert names(tmp_path) == ["ppo_checkpoint_step_1.pt", "ppo_checkpoint_step_2.pt"]
