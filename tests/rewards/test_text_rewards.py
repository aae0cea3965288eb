"""Rewards by the text of a completion: what they score, and that no text is run or slows them."""

from __future__ import annotations

import inspect
import math
import random
import re

import numpy as np
import pytest
from tiny_trainer import one_line

from ppo_fast.rewards.numbers import answer_number, last_number
from ppo_fast.rewards.text import (
    ExactMatch,
    Length,
    NumericMatch,
    RegexMatch,
    Repetition,
    exact_match,
    numeric_match,
    repetition,
)

SIZE = 3 * 10**5
HOSTILE = {
    "code": "__import__('os').system('touch owned') or __import__('os')._exit(7)",
    "digits": "7" * 10**5,
    "digits and commas": "1,234," * (SIZE // 6),
    "thousands": "1" + ",234" * (SIZE // 4) + "5",
    "slashes": "1/" * (SIZE // 2),
    "signs": "-" * SIZE,
    "points": "1." * (SIZE // 2),
    "exponents": "1e" * (SIZE // 2),
    "an exponent": "1e" + "9" * 10**5,
    "braces": "\\boxed{" * 10**4 + "{" * (SIZE // 2),
    "fractions": "\\frac{1}" * (SIZE // 8),
    "NUL": "\0" * SIZE + "1\0",
    "right to left": "\u202e" + "24 \u200f" * 1000,
    "surrogates": "\ud800 42",
    "spaces": " " * SIZE,
    "words": "a " * (SIZE // 2),
    "format": "{0.__class__} %s %n ${jndi}",
    "empty": "",
}


def score(reward, completion, **columns):
    (found,) = reward(["prompt"], [completion], **{k: [v] for k, v in columns.items()})
    return found


# Numbers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is 1,234.5 in all.", 1234.5),
        ("1,000,000", 1e6),
        ("-3", -3.0),
        ("x = \u22127", -7.0),
        ("+4", 4.0),
        ("2e5", 2e5),
        ("2E-3", 0.002),
        ("3/4", 0.75),
        ("-3 / 4", -0.75),
        (r"\frac{3}{4}", 0.75),
        (r"-\dfrac{ 1 }{2}", -0.5),
        ("50%", 50.0),
        (r"50\%", 50.0),
        ("-$20.50", -20.5),
        ("$-20", -20.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("1{,}234", 1234.0),
        (r"1\,234", 1234.0),
        ("5-3", 3.0),
        ("pages 12-15", 15.0),
        ("- 3 apples", 3.0),
        ("f(x)-3", 3.0),
        ("3 glasses of H2O", 3.0),
        ("1,2,3", 3.0),
        ("1,2345", 2345.0),
        ("12,34", 34.0),
        ("12abc", 12.0),
        ("first 1, then 2", 2.0),
        (r"\boxed{42} in 3 steps", 42.0),
        (r"\boxed{1} or \boxed{\text{about } \frac{3}{4}} of 5", 0.75),
        (r"\boxed{42", 42.0),
        ("2 + 2\n#### 4\nin 9 words", 4.0),
        (r"#### 4, so \boxed{5} of 6", 5.0),
        (r"\boxed{5}" + "\n#### 4", 4.0),
    ],
)
def test_numbers_that_are_read(text, expected):
    assert answer_number(text).value == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    "text", ["", "none", "H2O", r"\boxed{} of 3", "####\n3", "1/0", "9" * 400, "1e999", "1/1e999"]
)
def test_texts_without_a_number(text):
    assert answer_number(text) is None


def test_of_random_numbers_each_way_to_write_them():
    draw = random.Random(0)
    for _ in range(300):
        x = draw.uniform(-1, 1) * 10 ** draw.randint(-8, 12)
        for text in (repr(x), f"{x:.16e}", f"{x:,.12f}", f"so 17 and {x!r}."):
            assert last_number(text).value == pytest.approx(x, rel=1e-12, abs=1e-12), text


def test_numeric_match():
    for completion, answer, expected in [
        ("so it is 42.", "42", 1.0),
        ("so it is 42.", 42, 1.0),
        ("so it is 42.", np.float32(42), 1.0),
        ("so it is 41", "42", 0.0),
        ("42 or 41", "42", 0.0),
        ("no idea", "42", 0.0),
        ("1,234", "First 2.\n#### 1234", 1.0),
        ("0.75", "3/4", 1.0),
        ("1000001", "1000000", 1.0),
        ("1000002", "1000000", 0.0),
        ("1e-9", "0", 1.0),
        ("1e-5", "0", 0.0),
        ("1e-8", "2e-8", 0.0),
        ("50%", "50", 1.0),
        ("50%", "0.5", 1.0),
        ("0.5", "50%", 1.0),
        ("50", "50%", 1.0),
        ("50%", "0.5%", 0.0),
        ("0.0000001", "50%", 0.0),
        ("0.500004", "50%", 0.0),
        ("9" * 400, "42", 0.0),
        ("42", None, None),
    ]:
        assert score(numeric_match, completion, answer=answer) == expected, (completion, answer)


def test_numeric_match_in_what_is_extracted():
    reward = NumericMatch("truth", extract=r"Answer: ([^\n]*)", tolerance=0.1)
    assert reward.needs == ("truth",)
    assert score(reward, "Answer: 7\nAnswer: 10.5 \n3", truth="10") == 1.0
    assert score(reward, "10", truth="10") == 0.0
    assert score(reward, "Answer: ?\n10", truth="10") == 0.0


@pytest.mark.parametrize("answer", ["no number", float("nan"), [1, 2], "1/0"])
def test_a_column_without_a_number_is_an_error(answer):
    with pytest.raises(ValueError, match=r"column 'answer': got .* for the prompt 'prompt'") as e:
        score(numeric_match, "42", answer=answer)
    assert one_line(e)


# Texts


def test_exact_match():
    assert score(exact_match, " Paris\n", answer="Paris ") == 1.0
    assert score(exact_match, "paris", answer="Paris") == 0.0
    assert score(exact_match, "Paris.", answer="Paris") == 0.0
    assert score(exact_match, "7", answer=7) == 1.0
    assert score(exact_match, "None", answer=None) is None
    assert score(ExactMatch(ignore_case=True), " STRASSE\n", answer="straße") == 1.0


def test_exact_match_of_what_is_extracted():
    reward = ExactMatch("truth", extract=r"<answer>(.*?)</answer>")
    assert score(reward, "<answer>A</answer> <answer> B </answer>", truth="B") == 1.0
    assert score(reward, "<answer>B</answer> <answer>A</answer>", truth="B") == 0.0
    assert score(reward, "B", truth="B") == 0.0
    assert score(ExactMatch(extract="[A-D]"), "not A but C", answer="C") == 1.0
    assert score(ExactMatch(extract="(x)?y"), "y", answer="") == 1.0, "a group without a match"


@pytest.mark.parametrize("reward", [exact_match, numeric_match])
def test_the_column_is_named_where_rewards_are_called(reward):
    assert reward.needs == ("answer",)
    assert list(inspect.signature(reward).parameters) == ["prompts", "completions", "answer"]
    with pytest.raises(ValueError, match=r"got no column 'answer' of the data \(there are: b\)"):
        reward(["p"], ["c"], b=["x"])


def test_regex_match():
    assert RegexMatch("a+b")(["p"] * 3, ["xaab", "b", "ab"]) == [1.0, 0.0, 1.0]
    assert RegexMatch("a+b", full=True)(["p"] * 2, ["xab", "ab"]) == [0.0, 1.0]
    assert RegexMatch("AB", flags=re.IGNORECASE)(["p"], ["ab"]) == [1.0]


@pytest.mark.parametrize("make", [RegexMatch, lambda p: ExactMatch(extract=p)])
@pytest.mark.parametrize("pattern", ["(", "[a", 3])
def test_patterns_that_are_none(make, pattern):
    with pytest.raises(ValueError, match=r"(pattern|extract): got .*, expected a regular") as e:
        make(pattern)
    assert one_line(e)


def test_length():
    ids = [[1] * 10, [], [1] * 20, [1] * 5]
    expected = [0.0, -1.0, -1.0, -0.5]
    assert Length(10)(["p"] * 4, ["c"] * 4, completion_ids=ids) == expected
    assert list(inspect.signature(Length(10)).parameters)[2:] == ["completion_ids"]
    words = Length(2, unit="words", scale=4)
    assert words(["p"] * 2, ["one  two", "a b\nc d e f"]) == [0.0, -1.0]
    assert list(inspect.signature(words).parameters)[2:] == []
    assert Length(4, unit="characters")(["p"], ["abc"]) == [-0.25]
    with pytest.raises(ValueError, match="got no completion_ids"):
        Length(10)(["p"], ["c"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Length(0), "target: got 0"),
        (lambda: Length(True), "target: got True"),
        (lambda: Length(9, unit="lines"), "unit: got 'lines', expected 'tokens', 'words' or"),
        (lambda: Length(9, scale=0), "scale: got 0"),
        (lambda: NumericMatch(tolerance=-1), "tolerance: got -1"),
        (lambda: NumericMatch(tolerance=math.nan), "tolerance: got nan"),
        (lambda: Repetition(0), "n: got 0"),
    ],
)
def test_values_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_repetition():
    texts = ["one two three four", "a b a b a b", "A b a B", "x y", "", "z " * 102]
    expected = [0.0, 2 / 4 - 1, 0.0, 0.0, 0.0, 1 / 100 - 1]
    assert repetition(["p"] * 6, texts) == pytest.approx(expected)
    assert Repetition(1)(["p"], ["a b a"]) == pytest.approx([2 / 3 - 1])


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_completions_get_a_number(name, tmp_path, monkeypatch):
    """The suite's time limit is what a slow pattern would meet: a quadratic one takes hours."""
    monkeypatch.chdir(tmp_path)
    text = HOSTILE[name]
    rewards = [
        (exact_match, {"answer": "42"}),
        (ExactMatch(extract=r"#### (\S+)"), {"answer": "42"}),
        (numeric_match, {"answer": "42"}),
        (NumericMatch(extract=r"#### (\S+)"), {"answer": "42"}),
        (RegexMatch(r"\d+"), {}),
        (Length(10, unit="words"), {}),
        (repetition, {}),
    ]
    for reward, columns in rewards:
        assert math.isfinite(score(reward, text, **columns))
    if name != "surrogates":
        assert score(numeric_match, text, answer="42") == 0.0
    assert list(tmp_path.iterdir()) == []
