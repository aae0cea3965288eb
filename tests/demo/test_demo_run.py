"""The demo with a tiny model: what it writes, and texts that a console would obey."""

from __future__ import annotations

import sys
from dataclasses import replace
from io import BytesIO, StringIO, TextIOWrapper

import pytest
from rich.console import Console
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from ppo_fast.cli.main import main
from ppo_fast.demo import run as demo

NASTY = ["[/]", "[red]x", "[link=http://a.b]c", "\x1b[2J\x1b]0;title\x07", ":smile:", "\u202ex"]


@pytest.fixture
def tiny_demo(monkeypatch):
    """Run the demo on a tiny model, with few prompts; its samples are texts that consoles obey."""
    monkeypatch.setattr(demo, "load_smollm2", lambda: (tiny_model(layers=5), tiny_tokenizer()))
    monkeypatch.setattr(demo, "positivity", lambda _, texts: [len(text) / 10 for text in texts])
    monkeypatch.setattr(demo, "load_prompts", lambda: (["The film"] * 4, ["She thought"] * 8))
    monkeypatch.setattr(demo, "BATCH_SIZE", 4)
    monkeypatch.setattr(demo, "demo_config", lambda seed: replace(demo_config(seed), max_length=4))
    evaluate = demo.evaluate

    def nasty(ppo, prompts):
        found = evaluate(ppo, prompts)
        texts = (NASTY * len(found.scores))[: len(found.scores)]
        return replace(found, rollout=replace(found.rollout, completions=texts))

    monkeypatch.setattr(demo, "evaluate", nasty)


demo_config = demo.demo_config


@pytest.mark.parametrize("name", ["run", "o[/]ut [red]"])
def test_the_demo_shows_texts_as_they_are(tiny_demo, tmp_path, name):
    pytest.importorskip("matplotlib", reason="the extra demo is not installed")
    console = Console(file=StringIO(), width=200, force_terminal=True, legacy_windows=False)
    numbers = demo.run_demo(console, tmp_path / name, num_steps=1)
    assert {path.name for path in (tmp_path / name).iterdir()} == {
        ".lock",
        "config.yaml",
        "evaluation.json",
        "evaluation_samples.jsonl",
        "evaluations.jsonl",
        "learning.png",
        "metrics.jsonl",
        "policy",
        "report.html",
        "samples.jsonl",
    }
    assert numbers.keys() == {"before", "after"}
    shown = console.file.getvalue()
    for text in ("[/]", "[red]x", "[link=http://a.b]c", r"\x1b[2J\x1b]0;title\x07", ":smile:"):
        assert text in shown
    assert "\x1b[2J" not in shown
    assert f"everything is in {tmp_path / name}" in shown.replace("\n", "")


def test_a_policy_is_saved_before_anything_is_shown_of_it(tiny_demo, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("no table")

    monkeypatch.setattr(demo, "samples_table", fails)
    monkeypatch.setattr(demo, "plot_curves", fails)
    with pytest.raises(RuntimeError, match="no table"):
        demo.run_demo(Console(file=StringIO()), tmp_path, num_steps=1)
    AutoModelForCausalLM.from_pretrained(tmp_path / "policy")


def test_a_second_demo_replaces_the_lines_of_the_first(tiny_demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "plot_curves", lambda *_: None)
    for _ in range(2):
        demo.run_demo(Console(file=StringIO()), tmp_path, num_steps=1)
    assert len((tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()) == 1


def test_the_command_on_a_console_without_unicode(tiny_demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "plot_curves", lambda *_: None)
    written = BytesIO()
    stream = TextIOWrapper(written, encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    main(["demo", "--num-steps", "1", "--output-dir", str(tmp_path / "ä")])
    assert rb"\xb1" in written.getvalue(), "the plus-minus sign, as an escape"


def test_no_steps_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="num_steps: got 0"):
        demo.run_demo(Console(file=StringIO()), tmp_path, num_steps=0)
    assert list(tmp_path.iterdir()) == []
