"""Constitutions in the classic interface: names, arguments and keys."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_trainer import no_model_runs

from ppo_fast.classic.constitution import (
    ConstitutionalFilter,
    ConstitutionalFramework,
    ConstitutionalPrinciple,
    compare_responses,
    critique_and_revise,
    setup_default_framework,
)
from ppo_fast.rewards.constitution import Constitution

NAMES = ["harm", "truthfulness", "fairness", "autonomy"]
BAD = "I will kill him, and you must do as I say. Those people!"


def test_the_default_framework_by_rules():
    framework = setup_default_framework()
    with no_model_runs():
        found = framework.evaluate_text(BAD)
        good = framework.evaluate_text("It is your choice.")
    assert set(found) == {
        "principle_results",
        "any_flagged",
        "flagged_principles",
        "weighted_score",
        "evaluation_method",
    }
    assert found["any_flagged"]
    assert found["flagged_principles"] == ["harm", "fairness", "autonomy"]
    assert found["weighted_score"] == pytest.approx((0.5 + 1 + 0.5 + 0.25) / 4)
    assert found["evaluation_method"] == "rules"
    assert found["principle_results"]["autonomy"]["matches"] == ["you must", "do as I say"]
    assert (good["any_flagged"], good["weighted_score"]) == (False, 1.0)


def test_the_default_framework_by_a_model():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.config.max_position_embeddings = tokenizer.model_max_length = 512
    framework = setup_default_framework(model, tokenizer, "cpu")
    found = framework.evaluate_text(BAD)
    assert found["evaluation_method"] == "model"
    expected = Constitution(judge=model, tokenizer=tokenizer).scores(["(not given)"], [BAD])
    assert [found["weighted_score"]] == pytest.approx(expected)
    for result in found["principle_results"].values():
        assert result["flagged"] == (result["score"] <= 0.5)


def test_principles_are_added_disabled_and_removed():
    framework = setup_default_framework()
    assert framework.get_active_principles() == NAMES
    framework.disable_principle("harm")
    framework.remove_principle("fairness")
    assert framework.evaluate_text(BAD)["flagged_principles"] == ["autonomy"]
    result = framework.principles["harm"].evaluate(BAD)
    assert result == {"principle_name": "harm", "enabled": False, "score": None, "flagged": False}
    framework.enable_principle("harm")
    framework.add_principle(ConstitutionalPrinciple("short", "Short.", len, weight=2.0))
    assert framework.get_active_principles() == ["harm", "truthfulness", "autonomy", "short"]
    with pytest.raises(KeyError, match="no principle 'fairness'; there are: harm"):
        framework.remove_principle("fairness")
    assert ConstitutionalFramework("empty").evaluate_text("a")["weighted_score"] == 1.0


def test_what_an_evaluation_function_gets_and_gives():
    def rate(text, model=None, tokenizer=None, device=None):
        return {"flagged": model is None, "device": device}

    principle = ConstitutionalPrinciple("p", "P.", rate)
    about = {"principle_name": "p", "enabled": True}
    assert principle.evaluate("a", device="cpu") == about | {
        "score": 0.0, "flagged": True, "device": "cpu",
    }  # fmt: skip
    assert principle.evaluate("a", tiny_model())["score"] == 1.0
    number = ConstitutionalPrinciple("p", "P.", lambda text: 0.6)
    assert number.evaluate("a") == about | {"score": 0.6, "flagged": False}
    with pytest.raises(ValueError, match=r'evaluation_fn gave the keys why, expected "score" or'):
        ConstitutionalPrinciple("p", "P.", lambda text: {"why": 1}).evaluate("a")
    with pytest.raises(ValueError, match="weight: got -1, expected a number above 0"):
        ConstitutionalPrinciple("p", "P.", rate, weight=-1)
    with pytest.raises(TypeError, match="evaluation_fn: got 3, expected a function"):
        ConstitutionalPrinciple("p", "P.", 3)


def test_statistics_are_of_the_tracked_history():
    framework = setup_default_framework()
    framework.batch_evaluate([BAD, "fine", "those people"], track_history=True)
    framework.evaluate_text(BAD)
    statistics = framework.get_statistics()
    assert statistics["total_evaluations"] == 3
    assert statistics["total_flagged"] == 2
    assert statistics["flagged_rate"] == pytest.approx(2 / 3)
    flags = {"harm": 1, "truthfulness": 0, "fairness": 2, "autonomy": 1}
    assert statistics["principle_flags"] == flags
    framework.clear_history()
    assert framework.get_statistics()["total_evaluations"] == 0


def test_comparison_critique_and_filters():
    framework = setup_default_framework()
    found = compare_responses(framework, "Why?", BAD, "I do not know.")
    assert found["preferred"] == "B"
    assert found["pair"] == {
        "prompt": "Why?", "response_chosen": "I do not know.", "response_rejected": BAD,
    }  # fmt: skip
    assert found["score_a"] < found["score_b"] == 1.0
    assert compare_responses(framework, "Why?", "a", "b")["preferred"] is None
    written = critique_and_revise(
        lambda requests: [f"{len(requests)} {requests[0][-30:]}"],
        *("Why?", BAD, framework.principles["harm"]),
    )
    assert written["critique"].startswith("1 ")
    assert written["revision"].endswith("Give only the new response.")
    filters = ConstitutionalFilter(framework, replacement="(removed)")
    assert filters.filter_input("Why?")["allowed"]
    out = filters.filter_output(BAD)
    assert (out["allowed"], out["text"]) == (False, "(removed)")
    assert filters.filter_output("So.")["text"] == "So."


@pytest.mark.parametrize("given", [float("nan"), float("inf"), None, "0.7"])
@pytest.mark.parametrize(
    "form", [lambda x: x, lambda x: {"score": x}, lambda x: {"score": x, "flagged": False}]
)
def test_a_score_that_is_no_finite_number_is_refused(given, form):
    framework = ConstitutionalFramework("f")
    framework.add_principle(ConstitutionalPrinciple("p", "P.", lambda text: form(given)))
    expected = f"principle p: its evaluation_fn gave the score {given!r}, expected a finite number"
    with pytest.raises(ValueError, match=expected) as caught:
        ConstitutionalFilter(framework).filter_output("a")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("score", [0, True, torch.tensor(0.25), 0.5])
def test_scores_of_any_type_of_number(score):
    principle = ConstitutionalPrinciple("p", "P.", lambda text: {"score": score})
    found = principle.evaluate("a")
    assert (found["score"], found["flagged"]) == (float(score), float(score) <= 0.5)
    assert type(found["score"]) is float
