"""Sampling settings: the ends of responses, and the distribution of their tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import PAD_ID, tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS, tiny_trainer

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.rollout import Sampling, decode
from ppo_fast.rollout.stops import Stops

TOKENIZER = tiny_tokenizer()
IDS = [[5, 61, 7], [44], [3, 2, 91, 250], [90, 90]] * 3


@pytest.fixture(scope="module")
def model():
    return LanguageModel(tiny_model("llama"))


def sample(model, sampling, prompts=IDS, eos_ids=(), seeds=None):
    return decode(
        model,
        prompts,
        sampling,
        seeds=torch.arange(len(prompts)) if seeds is None else seeds,
        eos_ids=list(eos_ids),
        pad_id=PAD_ID,
        to_text=TOKENIZER.decode,
    )


def responses(rollout):
    tokens = rollout.tokens
    rows = zip(tokens.response_ids.tolist(), tokens.response_lengths.tolist(), strict=True)
    return [ids[:length] for ids, length in rows]


# Stops


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(model):
    free = responses(sample(model, Sampling(24)))
    # across two tokens, and inside one
    texts = [TOKENIZER.decode(response) for response in free]
    stops = (texts[0][9:12], texts[5][4])
    rollout = sample(model, Sampling(24, stop_strings=stops))
    assert rollout.finished.any()
    for response, whole, finished in zip(
        responses(rollout), free, rollout.finished.tolist(), strict=True
    ):
        assert response == whole[: len(response)], "stopping changes no draw"
        ends = [
            n for n in range(1, 25) if any(stop in TOKENIZER.decode(whole[:n]) for stop in stops)
        ]
        assert len(response) == (ends[0] if ends else 24)
        assert finished == bool(ends)


@pytest.mark.parametrize(
    ("response", "ends"),
    [([5, 7], True), ([7], True), ([5, 5], False), ([7, 5], False)],
)
def test_stop_tokens(response, ends):
    assert Stops(Sampling(8, stop_token_ids=(9,)), [7]).ends(response) == ends


def letters(ids):
    return "".join(chr(i) for i in ids)


@pytest.mark.parametrize(
    ("text", "least", "ends"),
    [
        ("say STOP", 0, True),
        ("say STO", 0, False),
        ("STOP it", 0, False),
        ("x" * 100 + "STOP", 0, True),
        ("STOP", 5, False),
        ("STOP", 4, True),
        ("an END", 0, True),
    ],
)
def test_stop_strings(text, least, ends):
    sampling = Sampling(200, min_new_tokens=least, stop_strings=("STOP", "END"))
    assert Stops(sampling, [], letters).ends([ord(c) for c in text]) == ends


def ends_of(text, least, *strings):
    """Return the lengths at which a response of this text, a token a letter, may end."""
    stops = Stops(Sampling(200, min_new_tokens=least, stop_strings=strings), [], letters)
    return [n for n in range(1, len(text) + 1) if stops.ends([ord(c) for c in text[:n]])]


def test_a_stop_string_before_min_new_tokens_hides_no_later_one():
    assert ends_of("a\nb\nc\nd", 3, "\n") == [4, 6]
    assert ends_of("END END END END", 4, "END") == [7, 11, 15]
    assert ends_of("aaaa", 0, "aa") == [2, 3, 4], "occurrences may overlap"
    assert ends_of("STOP, END", 5, "STOP", "END") == [9]
    words = ["END", " END", " E", "ND", " END"]
    stops = Stops(
        Sampling(9, min_new_tokens=3, stop_strings=("END",)),
        [],
        lambda ids: "".join(words[i] for i in ids),
    )
    assert [n for n in range(1, 6) if stops.ends(list(range(n)))] == [4, 5]


def test_a_character_of_several_tokens_completes_a_stop_string():
    ids = TOKENIZER("a é€ b")["input_ids"]
    stops = Stops(Sampling(9, stop_strings=("é€",)), [], TOKENIZER.decode)
    found = [n for n in range(1, len(ids) + 1) if stops.ends(ids[:n])]
    assert [TOKENIZER.decode(ids[:n]) for n in found] == ["a é€"]


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ValueError, match="stop_strings: need a tokenizer"):
        Stops(Sampling(8, stop_strings=("x",)), [])


@pytest.mark.parametrize("wrong", [307, -1])
def test_stop_tokens_outside_the_vocabulary_are_refused(model, wrong):
    with pytest.raises(ValueError, match=rf"stop_token_ids: got {wrong}, expected 0 to 306"):
        sample(model, Sampling(8, stop_token_ids=(wrong,)))


def test_numbers_of_numpy_are_numbers():
    sampling = Sampling(np.int64(8), top_k=np.int32(3), stop_token_ids=(np.int64(7),))
    assert sampling == Sampling(8, top_k=3, stop_token_ids=(7,))


@pytest.mark.parametrize("slots", [None, 2])
def test_min_new_tokens_keeps_stops_away_at_first(model, slots):
    ends = list(range(150))  # half of all draws
    sampling = Sampling(12, min_new_tokens=5, stop_token_ids=tuple(ends[:70]))
    rollout = sample(model, sampling, eos_ids=ends[70:])
    assert rollout.finished.all()
    for row, (prompt, response) in enumerate(zip(IDS, responses(rollout), strict=True)):
        assert len(response) > 5
        assert not set(response[:-1]) & set(ends)
        logits = model.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        chosen = torch.tensor(response)[:, None]
        full = logits.double().log_softmax(-1).gather(1, chosen)[:, 0]
        logits[:5, ends] = -torch.inf
        drawn_from = logits.double().log_softmax(-1).gather(1, chosen)[:, 0]
        length = slice(0, len(response))
        torch.testing.assert_close(rollout.logprobs[row, length].double(), full, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            rollout.sampling_logprobs[row, length].double(), drawn_from, atol=1e-4, rtol=0
        )
    assert sampling.truncates


# The distribution


@pytest.mark.parametrize(
    ("options", "allowed"),
    [({}, 23), ({"temperature": 0.6}, 23), ({"top_k": 5}, 5), ({"top_p": 0.7}, None)],
)
def test_draws_follow_the_distribution(options, allowed):
    """Chi-square test of the second token, given the first, with a vocabulary of 23."""
    model = LanguageModel(tiny_model("llama", vocab_size=23, seed=2))
    count = 4000
    sampling = Sampling(2, **options)
    drawn = sample(model, sampling, [[5, 7, 3]] * count, seeds=torch.arange(count) * 7919)
    pairs = torch.tensor(responses(drawn))
    first = int(pairs[:, 0].mode().values)
    found = pairs[pairs[:, 0] == first, 1].bincount(minlength=23).double()
    p = (
        model.model(torch.tensor([[5, 7, 3, first]])).logits[0, -1].double() / sampling.temperature
    ).softmax(-1)
    kept = torch.ones(23, dtype=torch.bool)
    order = p.argsort(descending=True)
    if sampling.top_k:
        kept[order[sampling.top_k :]] = False
    if sampling.top_p < 1:
        kept[order[p[order].cumsum(0) - p[order] >= sampling.top_p]] = False
    assert allowed is None or kept.sum() == allowed
    assert (found[~kept] == 0).all()
    expected = p[kept] / p[kept].sum() * found.sum()
    statistic = ((found[kept] - expected) ** 2 / expected).sum().item()
    freedom = int(kept.sum()) - 1
    # Wilson and Hilferty's approximation; 4.5 standard deviations
    bound = freedom * (1 - 2 / (9 * freedom) + 4.5 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < bound


# The trainer


def test_the_trainers_settings_reach_its_rollouts():
    stop = "e"
    trainer = tiny_trainer(
        critic="head", max_length=30, stop_strings=(stop,), min_new_tokens=2, rollout_slots=2
    )
    rollout = trainer.rollout(PROMPTS)
    assert rollout.sampling == trainer.config.sampling()
    assert rollout.states is not None
    for text, finished in zip(rollout.completions, rollout.finished.tolist(), strict=True):
        assert stop not in text[:-6]
        assert finished or stop not in text
    assert (rollout.tokens.response_lengths >= 2).all()
    assert trainer.train_step(PROMPTS)["first_max_log_ratio"] < 1e-3


def test_an_out_of_context_prompt_is_refused_before_anything_runs():
    trainer = tiny_trainer(critic="head")
    trainer.engine.generate = None  # would be called
    with pytest.raises(ValueError, match="prompt"):
        trainer.rollout(["a " * 200])
