"""Space on the disk, compared with what a run will write."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
from tiny_models import tiny_model
from tiny_trainer import PROMPTS, one_line, tiny_trainer

from ppo_fast.checkpointing import space
from ppo_fast.checkpointing.space import check_space, checkpoint_bytes, shown_bytes, weights_bytes

Usage = namedtuple("Usage", "total used free")
RUN = {"num_steps": 100, "checkpoint_freq": 10, "keep_last": None}
EXPORTS = {"policy/": 40, "critic/": 10}


@pytest.fixture
def free(monkeypatch):
    """The bytes that are free, of whatever folder; also which folders were asked about."""
    left, asked = [0], []

    def usage(folder):
        asked.append(folder)
        return Usage(10**12, 0, left[0])

    monkeypatch.setattr(space.shutil, "disk_usage", usage)
    left.append(asked)
    return left


@pytest.mark.parametrize(
    "options",
    [
        {"critic": "model"},
        {"critic": "head"},
        {"critic": "top", "num_layers_unfrozen": 1},
        {"critic": "head", "compute_dtype": "bfloat16", "trained_weights": "kahan"},
        {"critic": "head", "compute_dtype": "bfloat16", "trained_weights": "stochastic"},
    ],
)
def test_the_size_is_that_of_the_file(tmp_path, options):
    trainer = tiny_trainer(hidden=128, num_epochs=1, **options)
    modules = {"policy": trainer.policy.model}
    if trainer.critic.module is not None:
        modules["value"] = trainer.critic.module
    found = checkpoint_bytes(modules, trainer.learner.optimizers)
    trainer.train(PROMPTS, 1, 2, progress=False)
    file = trainer.save_checkpoint(tmp_path, 1).stat().st_size
    assert found == pytest.approx(file, rel=0.05)
    assert checkpoint_bytes(modules, trainer.learner.optimizers) == found, "after a step too"


def test_weights_that_are_tied_count_once(tmp_path):
    model = tiny_model(hidden=128, family="gpt2")  # its LM head is its embedding
    model.save_pretrained(tmp_path)
    file = (tmp_path / "model.safetensors").stat().st_size
    assert weights_bytes(model) == pytest.approx(file, rel=0.05)
    for weight in model.transformer.h.parameters():
        weight.requires_grad_(False)
    rest = sum(w.nbytes for w in model.parameters() if w.requires_grad)
    assert weights_bytes(model, trained_only=True) == rest


def test_enough_space_says_nothing(tmp_path, free, caplog):
    free[0] = 10 * 100 + 50
    check_space(tmp_path, 100, EXPORTS, **RUN)
    assert not caplog.records


@pytest.mark.parametrize(
    ("left", "when", "fits"),
    [
        (1049, "after the last step, when policy/ and critic/ are written", 9),
        (999, "at step 100", 8),
        (520, "at step 60", 4),
        (201, "at step 30", 1),
    ],
)
def test_a_disk_that_will_be_full_is_told(tmp_path, free, caplog, left, when, fits):
    free[0] = left
    check_space(tmp_path, 100, EXPORTS, **RUN)
    (said,) = (record.getMessage() for record in caplog.records)
    assert f"each checkpoint takes 100 B: it will be full {when}; keep_last={fits} fits" in said
    caplog.clear()
    check_space(tmp_path, 100, EXPORTS, **RUN | {"keep_last": fits})
    assert not caplog.records
    with_more = RUN | {"keep_last": fits + 1}
    check_space(tmp_path, 100, EXPORTS, **with_more)
    assert caplog.records, "one more does not fit"


def test_too_little_for_two_checkpoints_is_an_error(tmp_path, free):
    free[0] = 199
    with pytest.raises(ValueError, match=r"^output_dir: .* has 199 B free") as caught:
        check_space(tmp_path / "run", 100, EXPORTS, **RUN)
    assert one_line(caught)
    said = str(caught.value)
    assert "a run writes 2 checkpoints 200 B, policy/ 40 B, critic/ 10 B" in said
    assert "free some space, use keep_last=1, or name a folder on another disk" in said
    with pytest.raises(ValueError, match="free some space, or name") as caught:
        check_space(tmp_path, 100, EXPORTS, **RUN | {"keep_last": 1})
    assert "keep_last" not in str(caught.value)
    free[0] = 249
    with pytest.raises(ValueError, match="2 checkpoints 200 B, policy/ 150 B"):
        check_space(tmp_path, 100, {"policy/": 150}, **RUN)


def test_one_checkpoint_alone(tmp_path, free, caplog):
    free[0] = 150
    check_space(tmp_path, 100, EXPORTS, **RUN | {"num_steps": 3})
    assert not caplog.records
    free[0] = 149
    with pytest.raises(ValueError, match="a run writes 1 checkpoint 100 B"):
        check_space(tmp_path, 100, EXPORTS, **RUN | {"num_steps": 3})


def test_the_best_are_kept_besides(tmp_path, free, caplog):
    free[0], best = 520, {"keep_best": 2, "name": "checkpoint_dir"}
    check_space(tmp_path, 100, EXPORTS, **RUN | {"keep_last": 2}, **best)
    assert not caplog.records
    check_space(tmp_path, 100, EXPORTS, **RUN | {"keep_last": 3}, **best)
    assert "it will be full at step 60; keep_last=2 fits" in caplog.text
    with pytest.raises(ValueError, match=r"^checkpoint_dir: .* a run writes 7 checkpoints 700 B"):
        check_space(tmp_path, 100, EXPORTS, **RUN | best | {"keep_best": 5})


def test_a_resumed_run_counts_what_is_there(tmp_path, free, caplog):
    free[0] = 150
    resumed = {"done": 80, "existing": 8}
    with_eight = RUN | {"keep_last": 8}
    check_space(tmp_path, 100, EXPORTS, **with_eight, **resumed)
    assert not caplog.records, "an old one goes for each new one"
    check_space(tmp_path, 100, EXPORTS, **RUN, **resumed)
    assert "it will be full at step 100; keep_last=8 fits" in caplog.text
    check_space(tmp_path, 100, {}, **RUN, done=100, existing=10)


def test_the_folder_need_not_exist(tmp_path, free, monkeypatch):
    free[0] = 10**9
    check_space(tmp_path / "a" / "b", 1, {}, **RUN)
    monkeypatch.chdir(tmp_path)
    check_space(type(tmp_path)("c"), 1, {}, **RUN)
    assert free[1] == [tmp_path, tmp_path]


def test_a_real_disk(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(ValueError, match="a run writes 2 checkpoints"):
        check_space(tmp_path, free, {}, **RUN)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2e6, "2 MB"), (12.34e9, "12.3 GB")],
)
def test_sizes_in_words(size, text):
    assert shown_bytes(size) == text
