"""The noise of sample_tokens, as the reference computes it."""

from __future__ import annotations

import math

import pytest
import torch
from sample_truth import python_noise, python_philox, rows

from ppo_fast.ops.sample_tokens import reference

# Random123, kat_vectors: philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0"),
]
ANSWERS = [
    "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "408f276d 41c83b0e a20bc7c6 6d5451fd",
    "d16cfe09 94fdcceb 5001e420 24126ea1",
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("inputs", "answer"), list(zip(KNOWN_ANSWERS, ANSWERS, strict=True)))
def test_philox_known_answers(inputs, answer):
    counter, key = (words(text) for text in inputs)
    assert python_philox(counter, key) == words(answer)
    tensors = [[torch.tensor([word]) for word in group] for group in (counter, key)]
    assert [int(word) for word in reference.philox4x32(*tensors)] == words(answer)


@pytest.mark.parametrize(
    ("seed", "position"),
    [(0, 0), (1, 0), (0, 1), (2**32, 0), (-1, 5), (-(2**63), 3), (2**63 - 1, 2**32 - 1), (9, -1)],
)
def test_noise_is_the_documented_function(seed, position):
    got = reference.gumbel_noise(torch.tensor([seed]), torch.tensor([position]), 41)
    assert got.shape == (1, 41)
    expected = [python_noise(seed, position, token) for token in range(41)]
    torch.testing.assert_close(got[0].double(), torch.tensor(expected).double(), rtol=0, atol=2e-6)


def test_noise_counts_the_low_32_bits_of_the_position():
    seeds, here, there = torch.tensor([5]), torch.tensor([3]), torch.tensor([3 + 2**32])
    wrapped = reference.gumbel_noise(seeds, there, 41)
    assert torch.equal(reference.gumbel_noise(seeds, here, 41), wrapped)


def test_noise_is_float32_whatever_the_default():
    expected = reference.gumbel_noise(*rows(2), 41)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        got = reference.gumbel_noise(*rows(2), 41)
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("seed", "token", "expected"),
    [
        (207, 39758, -math.log(24 * math.log(2))),  # 0xffffffa2 rounds to 2^32 in float32
        (296, 186886, -math.log(40 * 2.0**-32)),  # the word 40
    ],
)
def test_noise_at_rare_words(seed, token, expected):
    got = reference.gumbel_noise(torch.tensor([seed]), torch.tensor([0]), token + 1)[0, token]
    assert got.item() == pytest.approx(expected, rel=1e-6)
    assert python_noise(seed, 0, token) == pytest.approx(expected, rel=1e-6)


def test_noise_of_the_smallest_and_the_largest_word(monkeypatch):
    extremes = tuple(torch.tensor([[word]]) for word in (0, 1, 2**32 - 1, 2**31))
    monkeypatch.setattr(reference, "philox4x32", lambda counter, key: extremes)
    got = reference.gumbel_noise(torch.tensor([0]), torch.tensor([0]), 4)[0].tolist()
    assert got[0] == got[1] == pytest.approx(32 * math.log(2), rel=1e-6)
    assert got[0] < 22.2
    assert got[2] == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)
    assert got[3] == pytest.approx(-math.log(math.log(2)), rel=1e-6)
