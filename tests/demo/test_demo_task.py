"""The demo's prompts, reward, diversity measure and plot."""

from __future__ import annotations

import struct

import pytest

from ppo_fast.demo.task import distinct_2, load_prompts, plot_curves, positivity


def test_prompts():
    train, held_out = load_prompts()
    assert len(train) == 64
    assert len(held_out) == 32
    prompts = train + held_out
    assert len({prompt.lower() for prompt in prompts}) == len(prompts)
    openings = [" ".join(prompt.split()[:3]) for prompt in prompts]
    assert len(set(openings)) == len(openings), "two prompts begin alike"
    for prompt in prompts:
        assert prompt == prompt.strip()
        assert not prompt.startswith("#")
        assert 5 <= len(prompt.split()) <= 12, prompt
        assert prompt[-1].isalpha() or prompt[-1] == ",", f"finished: {prompt}"


def test_prompts_are_neutral():
    pytest.importorskip("vaderSentiment", reason="the extra demo is not installed")
    train, held_out = load_prompts()
    prompts = train + held_out
    scores = positivity([""] * len(prompts), prompts)
    assert {prompt: score for prompt, score in zip(prompts, scores, strict=True) if score} == {}


def test_positivity_orders_texts():
    pytest.importorskip("vaderSentiment", reason="the extra demo is not installed")
    completions = [
        " it was wonderful, I loved every minute of it!",
        " it was on until ten.",
        " it was terrible, I hated every minute of it.",
        "",
    ]
    positive, neutral, negative, empty = positivity(["I saw this film and"] * 4, completions)
    assert 0.5 < positive <= 1
    assert neutral == empty == 0
    assert -1 <= negative < -0.5


def test_positivity_ignores_the_prompt():
    pytest.importorskip("vaderSentiment", reason="the extra demo is not installed")
    completion = " then we went home, happy."
    good, bad = positivity(["A wonderful, lovely day and", "A horrible day and"], [completion] * 2)
    assert good == bad > 0


@pytest.mark.parametrize(
    ("completions", "expected"),
    [
        (["a b c d"], 1.0),
        (["a a a a"], 1 / 3),
        (["The food was good", "the food, was bad!"], 4 / 6),
        # No bigram spans two completions: "b a" is not one here.
        (["a b", "a b"], 1 / 2),
        (["It's late", "it\u2019s late", "it s late"], 4 / 4),
        (["one", "", " \n"], 0.0),
        ([], 0.0),
    ],
)
def test_distinct_2(completions, expected):
    assert distinct_2(completions) == expected


@pytest.mark.parametrize("rewards", [[0.2], [0.2, 0.5, 0.7], [0.2, float("nan"), float("nan")]])
def test_plot_writes_a_png(tmp_path, rewards):
    matplotlib = pytest.importorskip("matplotlib", reason="the extra demo is not installed")
    backend = matplotlib.rcParams._get("backend")
    path = tmp_path / "curves.png"
    plot_curves(path, range(1, len(rewards) + 1), rewards, rewards)
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:])
    assert width > height > 400
    assert matplotlib.rcParams._get("backend") is backend, "the global backend was touched"


@pytest.mark.parametrize("lengths", [(0, 0, 0), (2, 1, 2), (1, 1, 2)])
def test_plot_refuses_unequal_lengths(tmp_path, lengths):
    steps, rewards, kls = ([0.0] * length for length in lengths)
    with pytest.raises(ValueError, match="must have one length"):
        plot_curves(tmp_path / "curves.png", steps, rewards, kls)
