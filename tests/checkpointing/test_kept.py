"""Checkpoints in a folder: damage is found, and the newest whole one is loaded."""

from __future__ import annotations

import math
import random

import pytest
import torch
from tiny_trainer import PROMPTS, tiny_trainer
from whole_state import assert_is, everything, trained

from ppo_fast.checkpointing.kept import checkpoints_in, load_newest, remove_old


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of the steps 1, 2 and 10."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("kept")
    trainer = trained()
    for step in (1, 2, 10):
        trainer.save_checkpoint(folder, step)
    return folder


def copies(folder, to):
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_only_our_names_are_checkpoints(folder, tmp_path):
    copies(folder, tmp_path)
    for name in ("ppo_checkpoint_step_99 (copy).pt", "ppo_checkpoint_step_x.pt", "a.pt"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "ppo_checkpoint_step_98.pt.abc.partial").write_text("half")
    assert list(checkpoints_in(tmp_path)) == [10, 2, 1]
    assert checkpoints_in(tmp_path / "none") == {}


@pytest.mark.parametrize("seed", range(24))
def test_a_flipped_bit_is_found_or_changes_nothing(folder, tmp_path, seed):
    content = bytearray((folder / "ppo_checkpoint_step_2.pt").read_bytes())
    draw = random.Random(seed)
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path = tmp_path / "ppo_checkpoint_step_2.pt"
    path.write_bytes(content)
    whole = tiny_trainer()
    whole.load_checkpoint(folder / "ppo_checkpoint_step_2.pt")
    expected, trainer = everything(whole), trained()
    before = everything(trainer)
    found = None
    try:
        trainer.load_checkpoint(path)
    except ValueError as error:
        found = str(error)
    assert found is None or str(path) in found
    assert_is(trainer, expected if found is None else before)


def test_the_newest_whole_one_is_loaded(folder, tmp_path, caplog):
    copies(folder, tmp_path)
    newest = tmp_path / "ppo_checkpoint_step_10.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    trainer = trained()
    assert load_newest(tmp_path, trainer.load_checkpoint).name == "ppo_checkpoint_step_2.pt"
    assert "step_10.pt cannot be read" in caplog.text
    assert "ppo_checkpoint_step_2.pt is loaded instead" in caplog.text
    assert load_newest(tmp_path / "none", trainer.load_checkpoint) is None


def test_a_disk_that_does_not_give_a_file_damages_none(folder, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError(5, "Input/output error")

    before = sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(OSError, match=r"checkpoint: .* cannot be read \(.*Input/output error\)"):
        load_newest(folder, tiny_trainer().load_checkpoint)
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(("prompts", "warns"), [(PROMPTS, False), (PROMPTS[:3], True)])
def test_other_prompts_than_the_checkpoints_are_told(tmp_path, caplog, prompts, warns):
    first = tiny_trainer()
    first.train(PROMPTS, 1, 2, checkpoint_dir=tmp_path, progress=False)
    first.train(PROMPTS[1:], 1, 2, progress=False)
    assert "prompts: they are others" not in caplog.text, "no checkpoint was loaded"
    resumed = tiny_trainer()
    resumed.load_checkpoint(tmp_path / "ppo_checkpoint_step_1.pt")
    resumed.train(prompts, 1, 2, progress=False)
    assert ("prompts: they are others than those" in caplog.text) is warns


def test_evaluations_that_are_no_numbers_are_damage(tmp_path):
    trainer = tiny_trainer()
    trainer.progress.evaluations = [{"step": 1, "reward": "high"}]
    path = trainer.save_checkpoint(tmp_path, 1)
    with pytest.raises(ValueError, match="is damaged: an evaluation of it holds"):
        tiny_trainer().load_checkpoint(path)


def test_where_none_is_whole_the_newest_is_named(folder, tmp_path):
    for path in copies(folder, tmp_path).iterdir():
        path.write_text("")
    with pytest.raises(ValueError, match=r"step_10\.pt cannot be read"):
        load_newest(tmp_path, trained().load_checkpoint)


def test_old_ones_are_removed(folder, tmp_path):
    copies(folder, tmp_path)
    remove_old(tmp_path, 10, None)
    assert len(checkpoints_in(tmp_path)) == 3
    remove_old(tmp_path, 2, 1)
    assert list(checkpoints_in(tmp_path)) == [10, 2], "those after the one written stay"
    remove_old(tmp_path, 10, 1)
    assert list(checkpoints_in(tmp_path)) == [10]


def test_a_run_from_an_older_checkpoint_keeps_its_own(tmp_path):
    """The one that was damaged gives up its name, and counts no more."""
    options = {"batch_size": 2, "checkpoint_dir": tmp_path, "checkpoint_freq": 2, "progress": False}
    tiny_trainer().train(PROMPTS, 4, **options)
    newest = tmp_path / "ppo_checkpoint_step_4.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    trainer = tiny_trainer()
    load_newest(tmp_path, trainer.load_checkpoint)
    trainer.train(PROMPTS, 1, **options | {"checkpoint_freq": 1}, keep_last=1)
    assert list(checkpoints_in(tmp_path)) == [3]
    assert (tmp_path / "ppo_checkpoint_step_4.pt.damaged").is_file()
    assert load_newest(tmp_path, tiny_trainer().load_checkpoint).name == "ppo_checkpoint_step_3.pt"


def changed_payload(folder, path, change):
    payload = torch.load(folder / "ppo_checkpoint_step_1.pt", weights_only=True)
    payload["version"] = 2  # of which there is no manifest
    change(payload)
    torch.save(payload, path)


def first_moment(payload):
    return payload["optimizers"]["policy"]["state"][0]


DAMAGE = {
    "no weights": lambda p: p["models"]["policy"].popitem(),
    "another weight": lambda p: p["models"]["value"].update(extra=torch.ones(1)),
    "nan": lambda p: next(iter(p["models"]["policy"].values())).fill_(math.nan),
    "no tensor": lambda p: p["models"]["policy"].update({"lm_head.weight": 3}),
    "infinite moment": lambda p: first_moment(p)["exp_avg_sq"].fill_(math.inf),
    "moments of nobody": lambda p: p["optimizers"]["policy"]["state"].update({99: {}}),
    "no groups": lambda p: p["optimizers"]["policy"].pop("param_groups"),
    "step": lambda p: p.update(step="one"),
    "negative": lambda p: p.update(prompts_drawn=-1),
    "stats": lambda p: p.update(stats=None),
    "random states": lambda p: p["random_states"].update(torch=torch.zeros(3)),
    "numpy's": lambda p: p["random_states"].update(numpy=[1]),
    "python's": lambda p: p["random_states"].update(python=[3, [1, 2], None]),
    "learner": lambda p: p["learner"].update(reward_moments=[1.0]),
    "coefficients": lambda p: p["learner"].update(coefficients={"kl": math.nan, "bonus": 0.0}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_before_anything_changes(folder, tmp_path, name):
    path = tmp_path / "old.pt"
    changed_payload(folder, path, DAMAGE[name])
    trainer = trained()
    before = everything(trainer)
    with pytest.raises(ValueError, match=r"checkpoint: .*old\.pt") as caught:
        trainer.load_checkpoint(path)
    assert len(str(caught.value).splitlines()) == 1
    assert_is(trainer, before)


def test_version_2_is_read(folder, tmp_path):
    path = tmp_path / "old.pt"
    changed_payload(folder, path, lambda p: p.pop("manifest"))
    trainer, other = tiny_trainer(), tiny_trainer()
    trainer.load_checkpoint(path)
    other.load_checkpoint(folder / "ppo_checkpoint_step_1.pt")
    assert_is(trainer, everything(other))


@pytest.mark.parametrize("what", ["weight", "moment"])
def test_nothing_that_is_not_finite_is_written(tmp_path, what):
    trainer = trained()
    trainer.save_checkpoint(tmp_path, 1)
    if what == "weight":
        with torch.no_grad():
            next(trainer.policy_model.parameters())[0, 0] = math.nan
    else:
        next(iter(trainer.value_optimizer.state.values()))["exp_avg"].fill_(math.inf)
    with pytest.raises(FloatingPointError, match=r"holds NaN or infinity; it is not written"):
        trainer.save_checkpoint(tmp_path, 2)
    assert list(checkpoints_in(tmp_path)) == [1]
