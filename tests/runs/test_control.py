"""Changes asked of a run through a file."""

import os
import time

import pytest
import torch
from tiny_trainer import PROMPTS, changed, tiny_trainer, weights

from ppo_fast.runs.control import Control, checked_changes

QUIET = {"progress": False}


def write(path, text):
    path.write_text(text, "utf-8")
    os.utime(path, (time.time() - 5, time.time() - 5))


def run(tmp_path, text, *, steps=3, at=1, trainer=None, **options):
    """Train; ``text`` is in the file after step ``at``. Return the trainer and its metrics."""
    trainer, found = trainer or tiny_trainer(), []
    path = tmp_path / "control.yaml"

    def on_step(step):
        found.append(step.metrics)
        if step.number == at:
            write(path, text)

    trainer.train(PROMPTS, steps, 2, control=path, on_step=on_step, **options, **QUIET)
    return trainer, found


def test_rates_and_the_kls_coefficient_change_from_the_next_step_on(tmp_path, caplog):
    text = "learning_rate: 1e-6\nvalue_learning_rate: 0.002\nkl_penalty: 0.5\n"
    _, found = run(tmp_path, text)
    assert [m["learning_rate"] for m in found] == [1e-3, 1e-6, 1e-6]
    assert [m["value_learning_rate"] for m in found] == [1e-3, 2e-3, 2e-3]
    assert [m.get("kl_coefficient") for m in found] == [None, 0.5, 0.5]
    assert "from step 2 on, learning_rate is 1e-06 instead of 0.001" in caplog.text
    assert "from step 2 on, kl_penalty is 0.5 instead of 0.05" in caplog.text
    assert not (tmp_path / "control.yaml").exists()


def test_a_scheduled_rate_is_scaled(tmp_path):
    options = {"lr_schedule": "linear"}
    _, plain = run(tmp_path, "{}", trainer=tiny_trainer(**options))
    _, scaled = run(tmp_path, "learning_rate: 5e-4", trainer=tiny_trainer(**options))
    rates = [[m["learning_rate"] for m in found] for found in (plain, scaled)]
    assert rates[1][0] == rates[0][0]
    assert rates[1][1:] == pytest.approx([rate / 2 for rate in rates[0][1:]])


def test_a_linear_course_of_the_kl_is_scaled(tmp_path):
    options = {"kl_controller": "linear", "kl_penalty": 0.1, "kl_penalty_end": 0.4}
    _, found = run(tmp_path, "kl_penalty: 0.1", trainer=tiny_trainer(**options), steps=4)
    assert [m["kl_coefficient"] for m in found] == pytest.approx([0.1, 0.1, 0.15, 0.2])


def test_a_course_is_scaled_each_time_anew():
    options = {"kl_controller": "linear", "kl_penalty": 0.1, "kl_penalty_end": 0.4}
    learner = tiny_trainer(**options, schedule_steps=4).learner
    for coefficient in (0.6, 0.7):
        learner.set_kl_coefficient(coefficient, 2)
        assert learner.kl_coefficient(2) == pytest.approx(coefficient)


def test_an_adaptive_coefficient_adapts_from_there_on(tmp_path):
    options = {"kl_controller": "adaptive", "kl_target": 1e9, "kl_horizon": 4}
    _, found = run(tmp_path, "kl_penalty: 2.0", trainer=tiny_trainer(**options))
    assert found[1]["kl_coefficient"] == 2.0
    assert found[2]["kl_coefficient"] == pytest.approx(2.0 * (1 - 0.2 * 2 / 4))


def test_a_checkpoint_is_written_on_request(tmp_path):
    run(tmp_path, "checkpoint: true", checkpoint_dir=tmp_path / "saved", checkpoint_freq=9)
    names = sorted(path.name for path in (tmp_path / "saved").glob("*.pt"))
    assert names == ["ppo_checkpoint_step_1.pt", "ppo_checkpoint_step_3.pt"]


def test_a_change_is_in_the_checkpoint(tmp_path, caplog):
    text = "learning_rate: 1e-5\nkl_penalty: 0.3"
    straight, _ = run(tmp_path, text, steps=4)
    options = {"checkpoint_dir": tmp_path / "saved", "checkpoint_freq": 9}
    run(tmp_path, text, steps=2, **options)
    first = tmp_path / "saved" / "ppo_checkpoint_step_1.pt"
    assert first.exists(), "written with the change"
    resumed = tiny_trainer()
    resumed.load_checkpoint(first)
    assert "as changed in the run before: the rate of the policy is 1e-05, the KL's" in caplog.text
    resumed.train(PROMPTS, 3, 2, **QUIET)
    assert not changed(resumed.policy_model, weights(straight.policy_model))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1e-6", "got 'learning_rat'; did you mean learning_rate?"),
        ("colour: red", "got 'colour'; expected some of learning_rate"),
        ("learning_rate: fast", "learning_rate: got 'fast', expected a number above 0"),
        ("learning_rate: 2", "learning_rate: got 2, expected a number above 0, at most 1"),
        ("kl_penalty: -1", "kl_penalty: got -1, expected a number at least 0"),
        ("kl_penalty: .nan", "kl_penalty: got nan, expected"),
        ("checkpoint: 3", "checkpoint: got 3, expected true or false"),
        ("kl_penalty: 1" + 400 * "0", "kl_penalty: got 1000"),
        ("[" * 3000, ""),
        ("- 1", r"got [1], expected lines such as learning_rate: 1.0e-6"),
        ("a: [", "no YAML"),
        ("!!python/object/apply:os.system ['true']", "no YAML"),
    ],
)
def test_what_cannot_be_applied_changes_nothing_and_is_said_once(tmp_path, caplog, text, message):
    _, found = run(tmp_path, text)
    assert {m["learning_rate"] for m in found} == {1e-3}
    said = [r.getMessage() for r in caplog.records if "nothing was changed" in r.getMessage()]
    assert len(said) == 1
    assert message in said[0]
    assert (tmp_path / "control.yaml").exists()


@pytest.mark.parametrize("text", ["", "  ", "{}", "checkpoint: false"])
def test_nothing_is_asked(tmp_path, text):
    control = Control(tmp_path / "control.yaml", tiny_trainer().learner)
    write(tmp_path / "control.yaml", text)
    assert control.apply(1) is False


def test_of_two_changes_none_is_applied_if_one_cannot_be(tmp_path, caplog):
    options = {"kl_controller": "linear", "kl_penalty": 0.1, "kl_penalty_end": 0.0}
    text = "learning_rate: 5e-5\nkl_penalty: 0.1"
    _, found = run(tmp_path, text, trainer=tiny_trainer(**options), steps=3, at=2)
    assert {m["learning_rate"] for m in found} == {1e-3}
    assert "a course can neither be scaled to 0 nor from 0; nothing was changed" in caplog.text


def test_a_course_is_not_ended_by_0(tmp_path, caplog):
    options = {"kl_controller": "adaptive", "kl_target": 3.0}
    run(tmp_path, "kl_penalty: 0", trainer=tiny_trainer(**options))
    assert "nothing was changed" in caplog.text


def test_a_file_that_cannot_be_removed_is_applied_once(tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise PermissionError("no")

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    _, found = run(tmp_path, "learning_rate: 1e-6", steps=4)
    assert [m["learning_rate"] for m in found] == [1e-3, 1e-6, 1e-6, 1e-6]
    assert caplog.text.count("was applied and cannot be removed") == 1
    assert caplog.text.count("learning_rate is 1e-06") == 1


def test_what_is_no_path_is_refused():
    with pytest.raises(TypeError, match="control: got 5, expected the path of a file"):
        tiny_trainer().train(PROMPTS, 1, 2, control=5, **QUIET)


def test_rates_of_groups_are_scaled():
    trainer = tiny_trainer(critic="baseline")
    weights = list(trainer.policy_model.parameters())
    trainer.policy_optimizer = torch.optim.AdamW(
        [{"params": weights[:2], "lr": 1e-3}, {"params": weights[2:], "lr": 1e-5}]
    )
    trainer.learner.set_rate("policy", 1e-4)
    rates = [group["lr"] for group in trainer.policy_optimizer.param_groups]
    assert rates == pytest.approx([1e-4, 1e-6])


def test_a_loaded_checkpoint_takes_changes_back(tmp_path):
    trainer = tiny_trainer()
    trainer.train_step(PROMPTS)
    before = trainer.save_checkpoint(tmp_path, 1)
    trainer.learner.set_rate("policy", 1e-6)
    trainer.learner.set_kl_coefficient(0.9, 1)
    trainer.load_checkpoint(before)
    assert trainer.policy_optimizer.param_groups[0]["lr"] == 1e-3
    assert trainer.learner.kl_coefficient(1) == 0.05


def test_a_setting_given_anew_counts(tmp_path, caplog):
    trainer = tiny_trainer()
    trainer.learner.set_rate("policy", 1e-6)
    trainer.learner.set_rate("value", 1e-7)
    trainer.learner.set_kl_coefficient(0.9, 0)
    saved = trainer.save_checkpoint(tmp_path, 1)
    resumed = tiny_trainer(learning_rate=5e-4, value_learning_rate=1e-3, kl_penalty=0.3)
    resumed.load_checkpoint(saved)
    assert resumed.policy_optimizer.param_groups[0]["lr"] == 5e-4
    assert resumed.learner.kl_coefficient(1) == 0.3
    assert "settings changed since the checkpoint: kl_penalty 0.05 -> 0.3" in caplog.text
    assert "as changed in the run before" not in caplog.text


def test_a_new_rate_of_the_policy_counts_for_a_value_function_without_one(tmp_path):
    trainer = tiny_trainer()
    trainer.learner.set_rate("value", 1e-7)
    resumed = tiny_trainer(learning_rate=5e-4)
    resumed.load_checkpoint(trainer.save_checkpoint(tmp_path, 1))
    assert resumed.value_optimizer.param_groups[0]["lr"] == 5e-4


def test_a_scheduler_of_the_users_own_keeps_its_rate(tmp_path, caplog):
    trainer = tiny_trainer()
    trainer.learner.set_rate("policy", 1e-6)
    saved = trainer.save_checkpoint(tmp_path, 1)
    resumed = tiny_trainer()
    torch.optim.lr_scheduler.ConstantLR(resumed.policy_optimizer)
    resumed.load_checkpoint(saved)
    assert "scheduler of your own; it stays, instead of 1e-06" in caplog.text


def test_a_rate_of_no_value_function_is_refused():
    with pytest.raises(ValueError, match="the trainer has no value function"):
        checked_changes("value_learning_rate: 1e-4", tiny_trainer(critic="baseline").learner)


def test_a_file_that_is_just_being_written_waits(tmp_path):
    trainer = tiny_trainer()
    path = tmp_path / "control.yaml"
    control = Control(path, trainer.learner)
    path.write_text("learning_rate: 1")
    assert control.apply(1) is False
    write(path, "learning_rate: 1e-6")
    assert control.apply(2) is True
    assert trainer.policy_optimizer.param_groups[0]["lr"] == 1e-6


def test_a_file_that_was_changed_again_is_read_again(tmp_path):
    trainer = tiny_trainer()
    path = tmp_path / "control.yaml"
    control = Control(path, trainer.learner)
    write(path, "learning_rate: 1e-6")
    control.apply(1)
    write(path, "learning_rate: 1e-7")
    control.forget()
    assert path.exists()
    control.apply(2)
    assert trainer.policy_optimizer.param_groups[0]["lr"] == 1e-7
