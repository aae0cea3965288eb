"""Objects that are told of a run."""

import pytest
import torch
from tiny_trainer import PROMPTS, tiny_trainer

from ppo_fast import Callback, Evaluation

QUIET = {"progress": False}


class Told(Callback):
    """Notes what it is told, in order."""

    def __init__(self):
        self.calls, self.result = [], "not told"

    def on_start(self, settings, steps):
        self.settings = settings
        self.calls.append(("start", steps))

    def on_step(self, step):
        self.calls.append(("step", step.number))
        self.step = step

    def on_evaluate(self, evaluated):
        self.calls.append(("evaluate", evaluated.step))

    def on_save(self, step, path):
        assert path.is_file()
        self.calls.append(("save", step))

    def on_end(self, result):
        self.calls.append(("end",))
        self.result = result


def test_order_of_the_calls(tmp_path):
    told, functions = Told(), []
    result = tiny_trainer().train(
        PROMPTS, 3, 2, callbacks=[told], on_step=functions.append, checkpoint_dir=tmp_path,
        checkpoint_freq=2, evaluation=Evaluation(["One"], every=2), **QUIET,
    )  # fmt: skip
    assert told.calls == [
        ("start", 0), ("evaluate", 0), ("step", 1), ("step", 2), ("evaluate", 2), ("save", 2),
        ("step", 3), ("evaluate", 3), ("save", 3), ("end",),
    ]  # fmt: skip
    assert [step.number for step in functions] == [1, 2, 3]
    assert told.result == result
    assert told.settings["learning_rate"] == 1e-3
    assert told.settings["batch_size"] == 2


def test_a_callback_that_overrides_nothing_is_one():
    tiny_trainer().train(PROMPTS, 1, 2, callbacks=[Callback()], **QUIET)


@pytest.mark.parametrize("wrong", [print, "tensorboard", object()])
def test_what_is_no_callback_is_refused_before_training(wrong):
    trainer = tiny_trainer()
    with pytest.raises(TypeError, match=r"callbacks: got .*, expected objects of classes that"):
        trainer.train(PROMPTS, 1, 2, callbacks=[wrong], **QUIET)
    assert trainer.progress.steps == 0


@pytest.mark.parametrize("wrong", [3, "print", lambda: None, lambda step, more: None])
def test_what_is_no_function_of_a_step_is_refused_before_training(wrong):
    trainer = tiny_trainer()
    with pytest.raises(TypeError, match=r"on_step: got .*, expected a function of a Step, or None"):
        trainer.train(PROMPTS, 1, 2, on_step=wrong, **QUIET)
    assert trainer.progress.steps == 0


@pytest.mark.parametrize("right", [print, [].append, lambda *args: None, lambda s, more=1: None])
def test_functions_that_take_a_step(right):
    tiny_trainer().train(PROMPTS, 1, 2, on_step=right, **QUIET)


@pytest.mark.parametrize("folder", [3, b"x", ["x"], "a\0b", ""])
def test_what_is_no_folder_is_named(folder):
    with pytest.raises(ValueError, match=r"^checkpoint_dir: .* cannot be made a folder"):
        tiny_trainer().train(PROMPTS, 1, 2, checkpoint_dir=folder, **QUIET)


@pytest.mark.parametrize("method", ["on_step", "on_evaluate"])
def test_an_error_in_a_callback_ends_the_run_after_a_checkpoint(tmp_path, method):
    class Fails(Told):
        pass

    def fail(self, given):
        if self.calls and getattr(given, "number", getattr(given, "step", 0)) == 2:
            raise KeyError("mine")

    setattr(Fails, method, fail)
    told = Fails()
    with pytest.raises(KeyError, match="mine"):
        tiny_trainer().train(
            PROMPTS, 4, 2, callbacks=[told], checkpoint_dir=tmp_path, checkpoint_freq=9,
            evaluation=Evaluation(["One"], every=1), **QUIET,
        )  # fmt: skip
    assert (tmp_path / "ppo_checkpoint_step_2.pt").exists()
    assert told.result is None, "told of an end with an error"


def test_all_are_told_of_the_end(caplog):
    class Fails(Callback):
        def on_step(self, step):
            raise KeyError("the real one")

        def on_end(self, result):
            raise RuntimeError("at the end")

    told = Told()
    with pytest.raises(KeyError, match="the real one"):
        tiny_trainer().train(PROMPTS, 1, 2, callbacks=[Fails(), told], **QUIET)
    assert told.result is None
    assert "callbacks: Fails failed at the end: at the end" in caplog.text

    class FailsAtTheEnd(Fails):
        def on_step(self, step):
            pass

    with pytest.raises(RuntimeError, match="at the end"):
        tiny_trainer().train(PROMPTS, 1, 2, callbacks=[FailsAtTheEnd(), told], **QUIET)
    assert told.result is not None


def test_checkpoints_at_the_end_are_told_of_and_pruned(tmp_path):
    told = Told()
    options = {"checkpoint_dir": tmp_path, "keep_last": 1, "checkpoint_freq": 9}
    trainer = tiny_trainer()
    for _ in range(2):
        trainer.train(PROMPTS, 3, 2, max_time=1e-6, callbacks=[told], **options, **QUIET)
    assert [call for call in told.calls if call[0] == "save"] == [("save", 1), ("save", 2)]
    assert [path.name for path in tmp_path.glob("*.pt")] == ["ppo_checkpoint_step_2.pt"]


def test_no_callbacks():
    tiny_trainer().train(PROMPTS, 1, 2, callbacks=None, **QUIET)


@pytest.mark.parametrize("critic", ["model", "baseline"])
def test_a_step_has_numbers_of_each_token(critic):
    told = Told()
    trainer = tiny_trainer(critic=critic)
    trainer.train(PROMPTS, 1, 4, callbacks=[told], **QUIET)
    step = told.step
    shape = step.rollout.tokens.response_ids.shape
    names = {"log_ratio", "advantage"} | ({"value"} if critic == "model" else set())
    assert step.per_token.keys() == names
    mask = step.rollout.tokens.response_mask
    for number in step.per_token.values():
        assert number.shape == shape
        assert number.dtype == torch.float32
        assert not number[~mask].any()
    assert step.per_token["log_ratio"].abs().max() < 1e-4, (
        "the first step's policy is the reference"
    )
    assert step.per_token["advantage"].any()
