"""Each metric that leaves its range is said once, with what to do."""

from __future__ import annotations

import logging
import re

import pytest
from tiny_trainer import PROMPTS, tiny_trainer

from ppo_fast.runs.health import RANGES, Health

GOOD = {
    "explained_variance": 0.3,
    "kl_sequence": 5.0,
    "clip_fraction": 0.1,
    "entropy": 2.0,
    "response_length": 40.0,
    "reward_std": 0.5,
    "finished_fraction": 0.5,
}
# Metric, its first and its last number, and how many steps of the latter it takes.
BAD = [
    ("explained_variance", 0.3, -0.5, 4, r"is -0\.02 in the mean of 10 steps"),
    ("kl_sequence", 5.0, 51.0, 1, "kl_sequence is 51 nats; .*raise kl_penalty"),
    ("clip_fraction", 0.1, 0.5, 3, r"is 0\.34 in the mean of 5 steps; .*lower learning_rate"),
    ("entropy", 2.0, 0.1, 5, r"fell from 2 to 0\.1; "),
    ("response_length", 40.0, 1.0, 5, "fell from 40 to 1; .*shrink"),
    ("reward_std", 0.5, 0.0, 5, "is 0 for 5 steps; equal rewards"),
    ("finished_fraction", 0.5, 0.0, 10, "is 0 for 10 steps; every response is cut off"),
]


def test_every_range_is_tested():
    assert {case[0] for case in BAD} == {one.metric for one in RANGES} == GOOD.keys()


def test_a_good_run_is_left_alone(caplog):
    health = Health()
    for _ in range(100):
        health.note(GOOD)
    assert not caplog.records


@pytest.mark.parametrize(("metric", "first", "last", "steps", "said"), BAD)
def test_a_metric_that_leaves_its_range(caplog, metric, first, last, steps, said):
    health = Health()
    for _ in range(60):
        health.note(GOOD | {metric: first})
    for number in range(steps):
        assert not caplog.records, f"after {number} steps"
        health.note(GOOD | {metric: last})
    (record,) = caplog.records
    assert re.search(said, record.message), record.message
    assert record.levelno == logging.WARNING
    for _ in range(20):
        health.note(GOOD | {metric: last})
    assert len(caplog.records) == 1, "once"


def test_early_steps_are_not_judged(caplog):
    health = Health()
    for _ in range(49):
        health.note({"explained_variance": -5.0})
    assert not caplog.records
    health.note({"explained_variance": -5.0})
    assert len(caplog.records) == 1


def test_a_run_is_looked_at(caplog):
    trainer = tiny_trainer(lambda prompts, completions: [1.0] * len(prompts), critic="head")
    trainer.train(PROMPTS, num_steps=6, batch_size=4, progress=False)
    assert caplog.text.count("reward_std is 0 for 5 steps; equal rewards teach nothing") == 1
