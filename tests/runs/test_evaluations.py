"""Evaluations in the course of a run, and what follows from them."""

import math
import random
import signal

import numpy as np
import pytest
import torch
from tiny_trainer import PROMPTS, count_letters, tiny_trainer
from whole_state import assert_is, everything, noisy_reward

from ppo_fast import Callback, Evaluation, evaluate
from ppo_fast.runs.evaluation import Evaluator

HELD_OUT = ["The sea", "A second one"]
QUIET = {"progress": False}


class Evaluations(Callback):
    """Keeps what it is told of evaluations."""

    def __init__(self):
        self.found = []

    def on_evaluate(self, evaluated):
        self.found.append(evaluated)


def steps_in(folder):
    return sorted(int(path.stem.rsplit("_", 1)[1]) for path in folder.glob("*.pt"))


def test_one_before_every_n_and_after():
    seen = Evaluations()
    result = tiny_trainer().train(
        PROMPTS, 5, 2, evaluation=Evaluation(HELD_OUT, every=2), callbacks=[seen], **QUIET
    )
    assert [one["step"] for one in result["evaluations"]] == [0, 2, 4, 5]
    assert [one.step for one in seen.found] == [0, 2, 4, 5]
    assert seen.found[0].rollout.prompts == HELD_OUT
    assert result["evaluations"][1] == {"step": 2} | seen.found[1].metrics


def test_without_every_only_before_and_after():
    result = tiny_trainer().train(PROMPTS, 3, 2, evaluation=Evaluation(HELD_OUT), **QUIET)
    assert [one["step"] for one in result["evaluations"]] == [0, 3]


def test_evaluations_change_nothing_of_the_training():
    plain, evaluated = tiny_trainer(), tiny_trainer()
    plain.train(PROMPTS, 4, 2, **QUIET)
    state = everything(plain)
    evaluated.train(PROMPTS, 4, 2, evaluation=Evaluation(HELD_OUT, every=1), **QUIET)
    assert_is(evaluated, state)
    assert [r.prompts for r in (plain.last_rollout, evaluated.last_rollout)] == [
        plain.last_rollout.prompts
    ] * 2


def test_an_evaluation_equals_the_function(tmp_path):
    trainer = tiny_trainer()
    result = trainer.train(
        PROMPTS, 2, 2, evaluation=Evaluation(HELD_OUT, samples_per_prompt=3), **QUIET
    )
    assert result["evaluations"][-1] == {"step": 2} | evaluate(trainer, HELD_OUT, 3)


def test_greedy_takes_the_likeliest_tokens():
    seen, trainer = Evaluations(), tiny_trainer()
    trainer.train(PROMPTS, 1, 2, evaluation=Evaluation(HELD_OUT, greedy=True), callbacks=[seen],
                  **QUIET)  # fmt: skip
    tokens = seen.found[-1].rollout.tokens
    with torch.no_grad():
        logits = trainer.policy_model(tokens.input_ids).logits
    for row, (first, count) in enumerate(
        zip(tokens.prompt_lengths.tolist(), tokens.response_lengths.tolist(), strict=True)
    ):
        drawn = tokens.input_ids[row, first : first + count]
        assert torch.equal(logits[row, first - 1 : first + count - 1].argmax(-1), drawn)
    assert trainer.config.top_k == 0


def test_greedy_samples_are_equal():
    with pytest.raises(ValueError, match="samples_per_prompt: got 2 with greedy=True, expected 1"):
        Evaluation(HELD_OUT, samples_per_prompt=2, greedy=True)


def test_other_rewards_judge_the_responses():
    def length(prompts, completions):
        return [float(len(text)) for text in completions]

    trainer = tiny_trainer(reward_weights=(2.0,), reward=count_letters)
    seen = Evaluations()
    trainer.train(
        PROMPTS, 1, 2, evaluation=Evaluation(HELD_OUT, reward=[length, count_letters]),
        callbacks=[seen], **QUIET,
    )  # fmt: skip
    one = seen.found[0]
    lengths = [len(text) for text in one.rollout.completions]
    assert one.metrics["reward/length/mean"] == pytest.approx(sum(lengths) / 2)
    letters = count_letters([], one.rollout.completions)
    assert one.metrics["reward"] == pytest.approx((sum(lengths) + sum(letters)) / 2)


class Course:
    """A reward whose mean in the n-th call on held-out prompts is the n-th of these numbers."""

    def __init__(self, *numbers):
        self.numbers, self.calls = list(numbers), 0

    def __call__(self, prompts, completions):
        if prompts[0] not in HELD_OUT:
            return count_letters(prompts, completions)
        self.calls += 1
        return [self.numbers[self.calls - 1]] * len(prompts)


def test_the_best_checkpoints_are_kept(tmp_path):
    trainer = tiny_trainer(Course(0, 3, 5, 1, 4, 2))
    trainer.train(
        PROMPTS, 5, 2, evaluation=Evaluation(HELD_OUT, every=1, keep_best=2),
        checkpoint_dir=tmp_path, keep_last=1, checkpoint_freq=5, **QUIET,
    )  # fmt: skip
    assert steps_in(tmp_path) == [2, 4, 5]


def test_the_best_can_be_the_lowest(tmp_path):
    evaluation = Evaluation(HELD_OUT, every=1, lower_is_better=True)
    tiny_trainer(Course(9, 3, 1, 4, 4)).train(
        PROMPTS, 4, 2, evaluation=evaluation, checkpoint_dir=tmp_path, keep_last=1, **QUIET
    )
    assert steps_in(tmp_path) == [2, 4]


def test_patience_ends_the_run(tmp_path, caplog):
    trainer = tiny_trainer(Course(0, 1, 3, 2, 3, 9, 9))
    options = {"evaluation": Evaluation(HELD_OUT, every=1, patience=2), "checkpoint_dir": tmp_path}
    result = trainer.train(PROMPTS, 9, 2, **options, **QUIET)
    assert trainer.progress.steps == 4
    assert (result["stopped_by"], result["interrupted"]) == ("patience", False)
    assert "stopped by patience after step 4" in caplog.text
    resumed = tiny_trainer(Course(7))
    resumed.load_checkpoint(trainer.newest_checkpoint)
    result = resumed.train(PROMPTS, 5, 2, **options, **QUIET)
    assert resumed.progress.steps == 4, "the history is in the checkpoint"
    assert result["stopped_by"] == "patience"


def test_a_resumed_run_goes_on_with_its_evaluations(tmp_path):
    evaluation = Evaluation(HELD_OUT, every=2)
    straight = tiny_trainer().train(PROMPTS, 6, 2, evaluation=evaluation, **QUIET)
    first = tiny_trainer()
    first.train(PROMPTS, 3, 2, evaluation=Evaluation(HELD_OUT, every=2), **QUIET)
    second = tiny_trainer()
    second.load_checkpoint(first.save_checkpoint(tmp_path, 3))
    result = second.train(PROMPTS, 3, 2, evaluation=evaluation, **QUIET)
    assert [one["step"] for one in result["evaluations"]] == [0, 2, 3, 4, 6]
    assert result["evaluations"][-1] == straight["evaluations"][-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every: got 0"),
        ({"patience": 2}, "patience: got 2 without every"),
        ({"keep_best": -1}, "keep_best: got -1"),
        ({"samples_per_prompt": 0}, "samples_per_prompt: got 0"),
        ({"greedy": "yes"}, "greedy: got 'yes'"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Evaluation(HELD_OUT, **options)


def test_an_unknown_metric_is_refused_before_training():
    trainer = tiny_trainer()
    with pytest.raises(ValueError, match=r"best: got 'rewrad', expected a metric .*: reward, "):
        trainer.train(PROMPTS, 2, 2, evaluation=Evaluation(HELD_OUT, best="rewrad"), **QUIET)
    assert trainer.progress.steps == 0


def test_prompts_alone_are_no_evaluation():
    with pytest.raises(TypeError, match=r"evaluation: got list, expected an Evaluation\("):
        tiny_trainer().train(PROMPTS, 2, 2, evaluation=HELD_OUT, **QUIET)


def test_another_evaluation_begins_anew(caplog):
    trainer = tiny_trainer()
    trainer.train(PROMPTS, 3, 2, evaluation=Evaluation(HELD_OUT, every=1), **QUIET)
    result = trainer.train(
        PROMPTS, 3, 2, evaluation=Evaluation(["One"], every=2, patience=9), **QUIET
    )
    assert [one["step"] for one in result["evaluations"]] == [3, 4, 6]
    assert "evaluation: it has other prompts, rewards or samples" in caplog.text


def test_responses_are_as_long_as_those_of_the_training():
    seen = Evaluations()
    tiny_trainer(max_length=20).train(
        PROMPTS, 1, 2, max_length=3, evaluation=Evaluation(HELD_OUT), callbacks=[seen], **QUIET
    )
    assert {one.rollout.tokens.response_ids.shape[1] for one in seen.found} == {3}


def test_rewards_that_draw_find_their_generators_as_without_evaluations():
    plain, evaluated = tiny_trainer(noisy_reward), tiny_trainer(noisy_reward)
    states = []
    for trainer, options in ((plain, {}), (evaluated, {"evaluation": Evaluation(HELD_OUT)})):
        random.seed(3)
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002
        trainer.train(PROMPTS, 2, 2, **options, **QUIET)
        states.append(everything(trainer))
    assert_is(evaluated, states[0])


def test_numbers_that_are_not_finite_are_never_the_best():
    trainer = tiny_trainer()
    evaluator = Evaluator(trainer, Evaluation(HELD_OUT, every=1, keep_best=3, patience=2))
    trainer.progress.evaluations = [
        {"step": step, "reward": reward}
        for step, reward in enumerate([1.0, math.nan, 3.0, math.nan])
    ] + [{"step": 4}]
    assert evaluator.ranked == [2, 0]
    assert evaluator.best == [2]
    assert evaluator.exhausted
    trainer.progress.evaluations = [{"step": 0}]
    assert not evaluator.exhausted


def test_after_a_signal_the_checkpoint_comes_first(tmp_path):
    order = []

    class Order(Callback):
        def on_evaluate(self, evaluated):
            order.append(f"evaluation {evaluated.step}")

        def on_save(self, step, path):
            order.append(f"checkpoint {step}")

        def on_step(self, step):
            if step.number == 2:
                signal.raise_signal(signal.SIGTERM)

    trainer = tiny_trainer()
    options = {"evaluation": Evaluation(HELD_OUT, every=1), "checkpoint_dir": tmp_path}
    trainer.train(PROMPTS, 4, 2, callbacks=[Order()], checkpoint_freq=9, **options, **QUIET)
    assert order[-1] == "checkpoint 2"
    assert "evaluation 2" not in order
    result = trainer.train(PROMPTS, 1, 2, **options, **QUIET)
    assert [one["step"] for one in result["evaluations"]][-2:] == [2, 3], "it is made up for"


def test_a_long_evaluation_does_not_end_a_run(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ppo_fast.runs.time_limit.time.monotonic", lambda: now[0])

    class Slow(Callback):
        def on_evaluate(self, evaluated):
            now[0] += 50

        def on_step(self, step):
            now[0] += 1

    result = tiny_trainer().train(
        PROMPTS, 90, 2, max_time=60, evaluation=Evaluation(HELD_OUT, every=100),
        callbacks=[Slow()], **QUIET,
    )  # fmt: skip
    assert result["stopped_by"] == "max_time"
    assert len(result["training_history"]["mean_rewards"]) == 10


def test_no_step_begins_whose_evaluation_would_end_too_late(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ppo_fast.runs.time_limit.time.monotonic", lambda: now[0])

    class Slow(Callback):
        def on_evaluate(self, evaluated):
            now[0] += 50

        def on_step(self, step):
            now[0] += 1

    result = tiny_trainer().train(
        PROMPTS, 90, 2, max_time=100, evaluation=Evaluation(HELD_OUT, every=3),
        callbacks=[Slow()], **QUIET,
    )  # fmt: skip
    assert len(result["training_history"]["mean_rewards"]) == 2


def test_a_run_whose_steps_are_all_done_was_not_interrupted(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ppo_fast.runs.time_limit.time.monotonic", lambda: now[0])

    def on_step(step):
        now[0] += 20

    result = tiny_trainer().train(PROMPTS, 2, 2, max_time=41, on_step=on_step, **QUIET)
    assert (result["interrupted"], result["stopped_by"]) == (False, None)


def test_a_reward_that_is_to_fall_may_fall(caplog):
    tiny_trainer(Course(5, 4, 3, 2)).train(
        PROMPTS, 3, 2, evaluation=Evaluation(HELD_OUT, every=1, lower_is_better=True), **QUIET
    )
    assert "held-out prompts fell" not in caplog.text


def test_a_held_out_reward_that_falls_is_said_once(caplog):
    class Up(Course):
        def __call__(self, prompts, completions):
            if prompts[0] in HELD_OUT:
                return super().__call__(prompts, completions)
            self.up = getattr(self, "up", 0) + 1
            return [self.up + i / 10 for i in range(len(prompts))]

    tiny_trainer(Up(1, 5, 4, 3, 2)).train(
        PROMPTS, 4, 2, evaluation=Evaluation(HELD_OUT, every=1), **QUIET
    )
    said = [r.getMessage() for r in caplog.records if "held-out prompts fell" in r.getMessage()]
    assert len(said) == 1
    assert "fell from 5 to 4, while that of training rose from 1.05 to 2.05" in said[0]


def test_a_best_checkpoint_can_be_loaded_again(tmp_path):
    trainer = tiny_trainer(Course(0, 3, 1, 1))
    trainer.train(
        PROMPTS, 3, 2, evaluation=Evaluation(HELD_OUT, every=1), checkpoint_dir=tmp_path,
        keep_last=1, **QUIET,
    )  # fmt: skip
    assert steps_in(tmp_path) == [1, 3]
    assert tiny_trainer().load_checkpoint(tmp_path / "ppo_checkpoint_step_1.pt") == 1
    assert not any(math.isnan(one["reward"]) for one in trainer.progress.evaluations)
