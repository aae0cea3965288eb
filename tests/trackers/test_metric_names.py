"""TRL's names: of a real step, exact values, and what keeps its name."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pytest
from tiny_trainer import PROMPTS, tiny_trainer

from ppo_fast.trackers.names import SAME, in_names_of_trl

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text("utf-8")


def named(trainer, **more):
    step = trainer.step(PROMPTS)
    metrics = step.metrics | more
    rows = len(step.rollout.tokens)
    return step, metrics, in_names_of_trl(
        metrics, step=step.number, sequences=rows, settings=asdict(trainer.config)
    )  # fmt: skip


def test_the_objective_is_that_of_trl():
    """By TRL's formulas, from the step's tokens: sums over a response, means over responses."""
    trainer = tiny_trainer(critic="head", kl_penalty=0.3, missing_eos_penalty=2.0, kl_in="reward")
    rewards = {}
    trainer.train([*PROMPTS], num_steps=1, batch_size=5, progress=False)  # off the reference
    seen = {}
    make = trainer.make_experience

    def kept(rollout, scores=None):
        seen["rollout"], seen["made"] = rollout, make(rollout, scores)
        return seen["made"]

    trainer.make_experience = kept
    _, metrics, found = named(trainer, eos_share=0.4)
    made, rollout = seen["made"], seen["rollout"]
    log_ratio = (made.old_logprobs - made.ref_logprobs).double()
    kl = log_ratio.sum(1).mean()
    scores = (made.scores - 2.0 * ~rollout.finished).double().mean()
    assert abs(kl) > 1e-6
    assert not rollout.finished.all()
    rewards = {
        "objective/kl": kl,
        "objective/entropy": -made.old_logprobs.double().sum(1).mean(),
        "objective/scores": scores,
        "objective/non_score_reward": -0.3 * kl,
        "objective/rlhf_reward": scores - 0.3 * kl,
        "val/num_eos_tokens": 2,
        "episode": 10,
        "lr": metrics["learning_rate"],
    }
    for name, value in rewards.items():
        assert found[name] == pytest.approx(float(value), rel=1e-5), name
    # the token rewards of the step hold the same sum
    of_tokens = float(made.rewards.sum(1).mean())
    assert found["objective/rlhf_reward"] == pytest.approx(of_tokens, rel=1e-5)


def test_no_metric_is_lost_and_no_other_renamed():
    _, metrics, found = named(tiny_trainer(critic="head"))
    new = {name for name in found if name not in metrics}
    gone = {name for name in metrics if name not in found}
    assert gone == (SAME.keys() & metrics.keys()) | {"entropy", "eos_share"}
    assert new == {SAME[name] for name in SAME.keys() & metrics.keys()} | {
        "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward", "episode",
        "val/num_eos_tokens",
    }  # fmt: skip
    for name in metrics.keys() & found.keys():
        assert found[name] == metrics[name]
    assert found["policy/clipfrac_avg"] == metrics["clip_fraction"]


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"kl_in": "loss"}, {"objective/rlhf_reward", "objective/non_score_reward"}),
        ({"kl_estimator": "k3"}, {"objective/rlhf_reward", "objective/non_score_reward"}),
        ({"entropy_target": 1.0}, {"objective/entropy", "policy/entropy_avg"}),
        ({"entropy_coef": 0.01}, {"objective/entropy"}),
        ({"mask_truncated": True}, {"objective/entropy"}),
    ],
)
def test_another_meaning_is_another_name(settings, missing):
    metrics = {"kl_sequence": 2.0, "mean_reward": 1.0, "entropy": 0.5, "response_length": 4.0}
    plain = {"kl_in": "reward", "kl_penalty": 0.1}
    every = in_names_of_trl(metrics, settings=plain)
    assert every["objective/entropy"] == 2.0
    assert every["objective/rlhf_reward"] == pytest.approx(0.8)
    found = in_names_of_trl(metrics, settings=plain | settings)
    assert not missing & found.keys()
    kept = "policy/entropy_avg" if "entropy_coef" in settings else "entropy"
    assert "objective/entropy" in found or found[kept] == 0.5


def test_a_coefficient_that_changes_is_the_steps():
    metrics = {"kl_sequence": 2.0, "mean_reward": 1.0, "kl_coefficient": 0.5}
    found = in_names_of_trl(metrics, settings={"kl_in": "reward", "kl_penalty": 0.1})
    assert found["objective/non_score_reward"] == -1.0


def test_the_page_has_every_name():
    section = PAGE.partition("## TRL's names")[2]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| ")]
    listed = set(re.findall(r"[\w/]+", " ".join(rows)))
    names = {*SAME.values(), "objective/entropy", "objective/non_score_reward", "episode",
             "objective/rlhf_reward", "policy/entropy_avg", "val/num_eos_tokens"}  # fmt: skip
    assert names == listed - {"TRL", "policy/approxkl_avg", "val/ratio_var", "eps"}
