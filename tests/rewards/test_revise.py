"""Critiques, revisions and preference pairs, with a function in place of a model."""

from __future__ import annotations

import logging

import pytest

from ppo_fast.rewards.constitution import Constitution
from ppo_fast.rewards.fit.pairs import read_pairs
from ppo_fast.rewards.principles import Principle, WordRules, default_principles
from ppo_fast.rewards.revise import critique, preference_pairs, revise, supervised_pairs

BRIEF = Principle("brief", "It is brief.", WordRules(["very"]))
POLITE = Principle(
    "polite",
    "It is polite.",
    WordRules(["damn"]),
    critique="C {prompt} {completion} {description}",
    revision="R {prompt} {completion} {critique} {description}",
)


def echo(requests):
    """Answer each request with itself, in brackets."""
    return [f" [{request}]\n" for request in requests]


def test_templates_are_filled_in_one_pass():
    found = critique(echo, ["p", "{completion}"], ["{prompt}", "r"], POLITE)
    assert found == ["[C p {prompt} It is polite.]", "[C {completion} r It is polite.]"]
    found = revise(echo, ["p"], ["{critique}"], ["{prompt}"], POLITE)
    assert found == ["[R p {critique} {prompt} It is polite.]"]
    (asked,) = critique(echo, ["p"], ["r"], BRIEF)
    assert "goes against this principle: It is brief." in asked
    (asked,) = revise(echo, ["p"], ["r"], ["too long"], BRIEF)
    assert "A critic said: too long" in asked
    assert "It is brief." in asked


def test_the_default_principles_ask_with_texts_of_their_own():
    for principle in default_principles():
        (asked,) = critique(echo, ["my prompt"], ["my response"], principle)
        (again,) = revise(echo, ["my prompt"], ["my response"], ["my critique"], principle)
        assert all(text in asked for text in ("my prompt", "my response"))
        assert all(text in again for text in ("my prompt", "my response", "my critique"))
        assert "{" not in asked + again


def test_supervised_pairs_revise_by_every_principle(caplog):
    asked = []

    def generate(requests):
        asked.extend(requests)
        kinds = {"C": "why", "R": f"better {len(asked)}", "p": "first"}
        return ["" if "empty" in text else kinds[text[0]] for text in requests]

    with caplog.at_level(logging.WARNING):
        rows = supervised_pairs(generate, ["p", "p empty"], [POLITE, POLITE])
    assert rows == [{"prompt": "p", "completion": "better 10"}]
    assert asked[::2] == [
        "p",
        "C p first It is polite.",
        "R p first why It is polite.",
        "C p better 6 It is polite.",
        "R p better 6 why It is polite.",
    ]
    assert "left out 1 of 2 responses" in caplog.text
    rows = supervised_pairs(echo, ["p"], [], responses=["mine"])
    assert rows == [{"prompt": "p", "completion": "mine"}]


def test_pairs_are_labelled_by_the_scores(caplog):
    constitution = Constitution([BRIEF, POLITE])
    prompts = ["a", "b", "c", "d"]
    first = ["very long", "short", "same", "short"]
    second = ["long", "very, very, very damn long", "same", "brief"]
    with caplog.at_level(logging.WARNING):
        pairs = preference_pairs(constitution, prompts, first, second)
    assert pairs == [
        {"prompt": "a", "chosen": "long", "rejected": "very long"},
        {"prompt": "b", "chosen": "short", "rejected": "very, very, very damn long"},
    ]
    (record,) = caplog.records
    assert record.getMessage() == (
        "preference_pairs: left out 2 of 4 pairs: 1 of equal responses, 1 with scores that differ "
        "by no more than 0"
    )
    pairs = preference_pairs(
        constitution, prompts, first, second, min_difference=0.25, margins=True
    )
    assert [(pair["prompt"], pair["margin"]) for pair in pairs] == [("b", 1 - (1 / 8 + 1 / 2) / 2)]
    assert [pair.margin for pair in read_pairs(pairs, use_margin=True)] == [pairs[0]["margin"]]
    assert preference_pairs(constitution, [], [], []) == []
    assert preference_pairs(constitution, ["a"], ["b"], ["b"]) == []


def test_numbers_of_texts_must_agree():
    with pytest.raises(ValueError, match="responses: got 1, expected 2, one a prompt"):
        critique(echo, ["a", "b"], ["c"], BRIEF)
    with pytest.raises(ValueError, match="critiques: got 0, expected 1, one a prompt"):
        revise(echo, ["a"], ["c"], [], BRIEF)
    with pytest.raises(ValueError, match="generate: gave 0 texts for 1 requests"):
        critique(lambda requests: [], ["a"], ["c"], BRIEF)
    constitution = Constitution([BRIEF])
    with pytest.raises(ValueError, match="second: got 2, expected 1, one a prompt"):
        preference_pairs(constitution, ["a"], ["b"], ["c", "d"])
    with pytest.raises(ValueError, match=r"min_difference: got 1, expected a number in \[0, 1\)"):
        preference_pairs(constitution, ["a"], ["b"], ["c"], min_difference=1)
