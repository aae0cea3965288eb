"""What a real model of 135M parameters can tell apart: the numbers of docs/constitution.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ppo_fast.demo.smollm2 import load_smollm2
from ppo_fast.rewards.yes_no import YesNoJudge

KINDNESS = "{completion}\n\nOne word for the tone of this answer, kind or rude:"


def pairs_of(principle):
    text = (Path(__file__).parent / "judged_pairs.yaml").read_text("utf-8")
    return yaml.safe_load(text)[principle]


@pytest.mark.model
def test_a_small_model_tells_kind_from_rude():
    judge = YesNoJudge(KINDNESS, *load_smollm2(), yes="kind", no="rude", chat=False)
    prompts, kind, rude = zip(*pairs_of("kindness"), strict=True)
    scores = judge([*prompts, *prompts], [*kind, *rude])
    pairs = [*zip(scores[: len(kind)], scores[len(kind) :], strict=True)]
    assert len(pairs) == 24
    assert sum(good > bad for good, bad in pairs) >= 23
    assert sum((good > 0.5) + (bad < 0.5) for good, bad in pairs) >= 42
