"""Exports whose disk is full or fails: OSError, whatever library writes, and the old files stay."""

from __future__ import annotations

import errno
import os

import pytest
from safetensors import SafetensorError
from tiny_trainer import one_line, tiny_trainer

from ppo_fast.exports.export import export_policy
from ppo_fast.exports.export_folder import exported

ERRORS = (
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    Exception("No space left on device (os error 28)"),  # of tokenizers
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
)


def write_half(folder, error):
    with exported(folder) as new:
        (new / "half").write_text("half")
        raise error


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_full_disk_is_an_oserror_that_names_the_folder(tmp_path, error):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy/old").write_text("old")
    said = r"export: .*policy cannot be written \(.*No space"
    with pytest.raises(OSError, match=said) as caught:
        write_half(tmp_path / "policy", error)
    assert one_line(caught)
    assert caught.value.__cause__ is error
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    assert [path.name for path in (tmp_path / "policy").iterdir()] == ["old"]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyError("mine"), KeyboardInterrupt()])
def test_other_errors_stay_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, exported(tmp_path / "policy"):
        raise error
    assert caught.value is error


def test_a_failed_export_leaves_the_models_config(tmp_path, monkeypatch):
    policy, tokenizer = (trainer := tiny_trainer()).policy.model, trainer.tokenizer

    def fail(*arguments, **options):
        policy.config.dtype = "changed"
        raise ERRORS[0]

    before = policy.config.dtype
    monkeypatch.setattr(policy, "save_pretrained", fail)
    with pytest.raises(OSError, match="cannot be written"):
        export_policy(policy, tokenizer, tmp_path / "policy")
    assert policy.config.dtype == before
