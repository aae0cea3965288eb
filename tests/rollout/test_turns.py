"""Rollouts with an environment that replies between the policy's turns."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny_models import PAD_ID, VOCAB_SIZE, tiny_model
from tiny_trainer import true_logprobs
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.rollout import Environment, Sampling, Turn, decode
from ppo_fast.rollout.own_cache import own_cache
from ppo_fast.rollout.turns import Turns

# About one token in eight ends a turn.
EOS_IDS = list(range(40))
PROMPTS = [[5, 61, 7, 300, 12, 8], [44], [3, 2, 91, 250], [90, 90, 90], [44], [77, 78]]


class Replies:
    """Replies some times with given ids, and keeps the turns."""

    def __init__(self, replies: Sequence[Sequence[int] | str | None]) -> None:
        self.replies, self.turns = list(replies), []

    def reply(self, turn: Turn) -> Sequence[int] | str | None:
        self.turns.append(turn)
        return self.replies.pop(0) if self.replies else None


def turns_of(environments: Sequence[Environment]) -> Turns:
    return Turns(
        environments,
        encode=lambda text: [200 + ord(c) for c in text],
        to_text=lambda ids: " ".join(map(str, ids)),
        vocab_size=VOCAB_SIZE,
    )


def sample(environments, *, model=None, max_length: int = 24, **options):
    return decode(
        model or LanguageModel(tiny_model()),
        PROMPTS,
        Sampling(max_length, temperature=0.8),
        seeds=torch.arange(len(PROMPTS)) + 100,
        eos_ids=EOS_IDS,
        pad_id=PAD_ID,
        turns=turns_of(environments),
        **options,
    )


def responses(rollout) -> list[list[int]]:
    lengths = rollout.tokens.response_lengths.tolist()
    rows = rollout.tokens.response_ids.tolist()
    return [row[:n] for row, n in zip(rows, lengths, strict=True)]


@pytest.mark.parametrize("slots", [None, 2])
def test_replies_stand_in_responses_and_are_not_trained_on(slots):
    environments = [Replies([[50, 51, 52], [53]]) for _ in PROMPTS]
    rollout = sample(environments, slots=slots)
    masks = rollout.tokens.response_mask.tolist()
    replied = 0
    for row, mask, environment, finished in zip(
        responses(rollout), masks, environments, rollout.finished.tolist(), strict=True
    ):
        expected, chosen, turns = [], [], environment.turns
        for i, turn in enumerate(turns):
            expected += turn.ids
            chosen += [True] * len(turn.ids)
            reply = [[50, 51, 52], [53], []][i]
            if len(expected) + len(reply) < 24:
                expected += reply
                chosen += [False] * len(reply)
                replied += bool(reply)
        if finished:
            assert row == expected
            assert mask[: len(row)] == chosen
            assert len(turns) == 3
        assert row[: len(expected)] == expected
        assert all(turn.ids[-1] in EOS_IDS for turn in turns)
        assert turns[0].text == " ".join(map(str, turns[0].ids))
    assert replied >= 6


def test_log_probs_are_those_of_one_pass_and_zero_at_replies():
    model = LanguageModel(tiny_model())
    rollout = sample([Replies([[50, 51], [52]]) for _ in PROMPTS], model=model)
    truth = true_logprobs(model.model, rollout.tokens, 0.8)
    mask = rollout.tokens.response_mask
    assert (~mask & (truth != 0)).any(), "there are replies"
    expected = truth.masked_fill(~mask, 0.0)
    torch.testing.assert_close(rollout.logprobs.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(rollout.sampling_logprobs == 0, ~mask)


def test_draws_do_not_depend_on_the_number_of_slots():
    one, two = (sample([Replies([[50, 51]]) for _ in PROMPTS], slots=n) for n in (None, 2))
    assert responses(one) == responses(two)


def test_an_environment_that_never_replies_changes_nothing():
    model = LanguageModel(tiny_model())
    plain = decode(
        model,
        PROMPTS,
        Sampling(24, temperature=0.8),
        seeds=torch.arange(len(PROMPTS)) + 100,
        eos_ids=EOS_IDS,
        pad_id=PAD_ID,
    )
    rollout = sample([Replies([]) for _ in PROMPTS], model=model)
    assert responses(rollout) == responses(plain)
    assert torch.equal(rollout.logprobs, plain.logprobs)
    assert torch.equal(rollout.finished, plain.finished)


def test_a_reply_without_room_ends_the_response():
    environments = [Replies([[50] * 30] * 9) for _ in PROMPTS]
    rollout = sample(environments)
    assert rollout.tokens.response_mask.sum() == rollout.tokens.response_lengths.sum()
    assert all(len(environment.turns) <= 1 for environment in environments)
    assert not rollout.finished.any(), "they were cut off"


def test_a_turn_that_ends_at_the_last_token_is_shown_too():
    seen = 0
    for length in range(2, 10):
        for replies in (0, 9):
            environments = [Replies([[50]] * replies) for _ in PROMPTS]
            rollout = sample(environments, max_length=length)
            for i, row in enumerate(responses(rollout)):
                if len(row) == length and row[-1] in EOS_IDS:
                    seen += 1
                    assert environments[i].turns[-1].ids[-1] == row[-1]
                    assert bool(rollout.finished[i]) is (replies == 0)
    assert seen >= 4


def test_a_reply_in_text_is_tokenised():
    environments = [Replies(["ab"]) for _ in PROMPTS]
    rollout = sample(environments)
    row = next(
        r for r, e in zip(responses(rollout), environments, strict=True) if len(e.turns) == 2
    )
    n = len(environments[responses(rollout).index(row)].turns[0].ids)
    assert row[n : n + 2] == [200 + ord("a"), 200 + ord("b")]


class Fails:
    def reply(self, turn: Turn) -> str:
        raise KeyError("no such tool")


@pytest.mark.parametrize(
    ("environment", "error", "words"),
    [
        (
            Fails(),
            RuntimeError,
            r"environment Fails raised KeyError: 'no such tool' \(.*test_turns",
        ),
        (Replies([[]]), ValueError, "environment Replies: its reply is empty; None ends"),
        (Replies([[999]]), ValueError, "holds ids from 999 to 999, expected 0 to 306"),
        (Replies([1.5]), TypeError, "replied 1.5, expected a text, a list of ids or None"),
    ],
)
def test_a_wrong_reply_is_named(environment, error, words):
    with pytest.raises(error, match=words):
        sample([environment] * len(PROMPTS))


def test_a_model_that_decodes_with_its_own_cache():
    config = GPTNeoConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_layers=2, num_heads=4, window_size=4,
        attention_types=[[["global", "local"], 1]], eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LanguageModel(GPTNeoForCausalLM(config).eval())
    rollout = sample([Replies([[50, 51], [52]]) for _ in PROMPTS], model=model)
    assert own_cache(model) is not None
    truth = true_logprobs(model.model, rollout.tokens, 0.8)
    mask = rollout.tokens.response_mask
    assert (~mask & (truth != 0)).any(), "there are replies"
    expected = truth.masked_fill(~mask, 0.0)
    torch.testing.assert_close(rollout.logprobs.double(), expected, rtol=0, atol=1e-5)
