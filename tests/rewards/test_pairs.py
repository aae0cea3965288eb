"""Preference pairs: read from rows of data of several forms, checked and split."""

from __future__ import annotations

import logging
import math

import pytest
from datasets import Dataset
from tiny_trainer import one_line

from ppo_fast.rewards.fit.pairs import Pair, Response, read_pairs, split

USER = {"role": "user", "content": "Tea?"}
YES, NO = ({"role": "assistant", "content": text} for text in ("Yes.", "No."))
PAIR = Pair(Response("Tea?", "Yes."), Response("Tea?", "No."))
ASKED = "Human: Tea?\n\nAssistant:"
CHATS = Pair(Response([USER], "Yes."), Response([USER], "No."))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."}, PAIR),
        ({"prompt": "Tea?", "response_chosen": "Yes.", "response_rejected": "No."}, PAIR),
        ({"prompt": "Tea?", "chosen": YES, "rejected": [NO]}, PAIR),
        ({"prompt": [USER], "chosen": "Yes.", "rejected": "No."}, CHATS),
        ({"prompt": [USER], "chosen": [YES], "rejected": NO}, CHATS),
        ({"chosen": [USER, YES], "rejected": [USER, NO]}, CHATS),
        ({"prompt": "Tea?", "chosen": [USER, YES], "rejected": [USER, NO]}, CHATS),
        ({"prompt": None, "chosen": [USER, YES], "rejected": [USER, NO]}, CHATS),
    ],
)
def test_forms_of_rows(row, expected):
    assert read_pairs([row]) == [expected]
    assert read_pairs(Dataset.from_list([row])) == [expected]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (f"{ASKED} Yes.", f"{ASKED} Yet", ASKED),
        (f"{ASKED} Yes.", f"{ASKED} Yes. No", ASKED),
        ("Yes.", "No.", ""),
        ("Yes.", "Yesterday", ""),
        ("Yes ", "Yes and no", ""),
        (f"{ASKED} Yes \n", f"{ASKED} Yes \nand no", ASKED),
        ("a b", "a b\n \nc", "a"),
    ],
)  # fmt: skip
def test_texts_without_a_prompt_begin_with_it(chosen, rejected, prompt):
    (pair,) = read_pairs([{"chosen": chosen, "rejected": rejected}])
    assert pair.chosen.prompt == pair.rejected.prompt == prompt
    assert (prompt + pair.chosen.completion, prompt + pair.rejected.completion) == (
        chosen,
        rejected,
    )
    assert pair.chosen.completion.strip()
    assert pair.rejected.completion.strip()


def test_a_text_is_one_message_of_the_user():
    assert PAIR.chosen.messages == CHATS.chosen.messages == [USER, YES]
    assert CHATS.is_chat
    assert not PAIR.is_chat


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, 'pairs[1]: has no "rejected"; it has the columns pro'),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "pairs[1]: the rejected response is"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "pairs[1]: the chosen response is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "pairs[1]: both responses are the s"),
        ({"chosen": "b", "rejected": "b"}, "pairs[1]: both responses are the s"),
        ({"chosen": [USER, YES], "rejected": [USER, YES]}, "pairs[1]: both responses are the same"),
        ({"chosen": [YES], "rejected": [NO]}, "pairs[1]: chosen has one message, and there is no"),
        ({"chosen": [USER, YES], "rejected": "b"}, "pairs[1]: rejected is a text, and the other"),
        ({"chosen": [YES, USER], "rejected": [USER, NO]}, 'pairs[1]: chosen ends with a mess'),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "pairs[1]: prompt: got 3, expected a text"),
        ({"prompt": "a", "chosen": [3], "rejected": "c"}, "pairs[1]: chosen: got the message 3"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "pairs[1]: chosen: got 3, expected a text"),
    ],
)  # fmt: skip
def test_rows_that_are_no_pairs(row, message):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(ValueError, match="pairs") as error:
        read_pairs([good, row])
    assert str(error.value).startswith(message)
    assert one_line(error)


@pytest.mark.parametrize("given", ["text", {"chosen": "a"}, 3])
def test_what_is_no_list_of_rows(given):
    with pytest.raises(TypeError, match=r"pairs: got .*, expected a list of rows"):
        read_pairs(given)
    with pytest.raises(TypeError, match=r"pairs\[0\]: got int, expected a dict"):
        read_pairs([3])
    with pytest.raises(ValueError, match="held_out: there are none"):
        read_pairs([], name="held_out")


def test_margins(caplog):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert [p.margin for p in read_pairs([row | {"margin": 2}], use_margin=True)] == [2.0]
    assert read_pairs([row | {"margin": "0.5"}], use_margin=True)[0].margin == 0.5, "of a .csv"
    for wrong in (math.nan, math.inf, None, True, "much"):
        with pytest.raises(ValueError, match=r"pairs\[1\]: margin is .*, expected a finite number"):
            read_pairs([row | {"margin": 1}, row | {"margin": wrong}], use_margin=True)
    with caplog.at_level(logging.INFO):
        assert read_pairs([row | {"margin": 2}])[0].margin == 0
    assert 'the column "margin" is not used' in caplog.text


def test_a_share_is_held_out():
    kept, away = split(20, 0.25, seed=1)
    assert (len(kept), len(away)) == (15, 5)
    assert sorted(kept + away) == list(range(20))
    assert split(20, 0.25, seed=1) == (kept, away)
    assert split(20, 0.25, seed=2) != (kept, away)
    assert [len(part) for part in split(3, 0.01, seed=0)] == [2, 1], "at least one"
    assert split(3, None, seed=0) == ([0, 1, 2], [])
    for wrong in (0, 1, 1.5, -0.1, True, math.nan, "half"):
        with pytest.raises(ValueError, match=r"held_out: got .*, expected a share in \(0, 1\)"):
            split(20, wrong, seed=0)
    with pytest.raises(ValueError, match=r"held_out: got 0.9, 2 of 2 pairs, which leaves none"):
        split(2, 0.9, seed=0)
