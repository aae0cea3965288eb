"""docs/metrics.md names every metric of a step, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny_trainer import PROMPTS, tiny_trainer

from ppo_fast.ops import ppo_loss, ppo_metrics

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text("utf-8")
NAMES = {
    name
    for line in PAGE.splitlines()
    if line.startswith("| `")
    for name in re.findall(r"`([\w/]+)`", line.split(" | ")[0])
}
OPTIONS = [
    {"critic": "model", "dual_clip": 3.0},
    {"critic": "head", "entropy_coef": 0.01, "kl_in": "loss"},
    {"critic": "baseline", "compute_dtype": "bfloat16"},
    {"critic": "head", "on_nonfinite": "skip"},
    {"critic": "baseline", "samples_per_prompt": 2, "max_resampled_batches": 1},
    {"kl_controller": "adaptive", "kl_target": 6.0, "entropy_target": 1.0, "target_kl": 0.1},
]


@pytest.fixture(scope="module")
def found():
    return [set(tiny_trainer(**options).train_step(PROMPTS)) for options in OPTIONS]


def test_every_metric_is_on_the_page_and_no_other(found):
    rewards = {"reward/count_letters/mean", "reward/count_letters/std"}
    assert set.union(*found) - rewards == NAMES
    assert all(rewards <= metrics for metrics in found)


def test_ratios_that_overflow_are_finite_metrics():
    """metrics.jsonl is JSON, which has no infinity."""
    logprobs, mask = torch.tensor([[-1.0, -200.0]]), torch.ones(1, 2, dtype=torch.bool)
    stats = ppo_loss(
        logprobs.flip(1), old_logprobs=logprobs, advantages=torch.zeros(1, 2), mask=mask
    ).metrics
    assert stats.isinf().any()
    metrics = ppo_metrics(stats)
    assert all(abs(value) < 1e39 for value in metrics.values())
    assert metrics["ratio_max"] > 3e38
