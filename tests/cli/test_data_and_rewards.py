"""ppo-fast train on data with columns, chats and held-out parts, with several rewards."""

from __future__ import annotations

import json

import pytest
import yaml
from command_line import PROMPTS, arguments, fails_in_a_line, lines, write
from tiny_models import tiny_classifier, tiny_tokenizer

from ppo_fast.cli.main import main

REWARDS = """
def right(prompts, completions, answer):
    return [float(number) for number in answer]

async def long(prompt, completion):
    return len(completion) / 10
"""
MORE = ["There were three songs", "The train to the north is there"]


@pytest.fixture
def place(place):
    (place / "more.py").write_text(REWARDS)
    rows = [
        {"question": text, "answer": i, "split": "test" if i == 1 else "train"}
        for i, text in enumerate([*PROMPTS, *MORE])
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def run(*more, **changes):
    settings = {"prompts": "rows.jsonl", "prompt_column": "question", "reward": None}
    return arguments(*more, **(settings | changes))


def test_several_rewards_with_weights_and_columns(place):
    main(run("--reward", "more.py:right", "more.py:long", "--reward-weights", "2", "0.5"))
    samples = lines(place / "run/samples.jsonl")
    for row in samples:
        assert row["rewards"]["right"] == row["columns"]["answer"]
        assert row["rewards"]["long"] == pytest.approx(len(row["completion"]) / 10)
        expected = 2 * row["rewards"]["right"] + 0.5 * row["rewards"]["long"]
        assert row["score"] == pytest.approx(expected)
    assert {"reward/right/mean", "reward/long/std"} <= lines(place / "run/metrics.jsonl")[0].keys()
    settings = yaml.safe_load((place / "run/config.yaml").read_text("utf-8"))
    assert settings["reward"] == ["more.py:right", "more.py:long"]
    main(["train", "--config", "run/config.yaml", "--resume", "--num-steps", "3"])
    assert len(lines(place / "run/metrics.jsonl")) == 3


@pytest.mark.parametrize("held_out", ["split=test", "0.2", "held.jsonl"])
def test_held_out_prompts_are_evaluated_and_not_trained_on(place, capsys, held_out):
    (place / "held.jsonl").write_text(json.dumps({"question": "Who", "answer": 7}) + "\n")
    main(run("--reward", "more.py:right", "--held-out", held_out, "--num-steps", "3"))
    trained = {row["prompt"] for row in lines(place / "run/samples.jsonl")}
    assert len(trained) == (5 if held_out == "held.jsonl" else 4)
    assert held_out != "split=test" or PROMPTS[1] not in trained
    found = lines(place / "run/evaluations.jsonl")
    reward = {"split=test": 1.0, "0.2": 2.0, "held.jsonl": 7.0}[held_out]
    assert [(one["step"], one["reward"]) for one in found] == [(0, reward), (3, reward)]
    assert [row["score"] for row in lines(place / "run/evaluation_samples.jsonl")] == [reward] * 2
    out = capsys.readouterr().out
    assert f"evaluation before training: reward +{reward:.3f} ± 0.000, 1 responses" in out
    assert f"evaluation after step 3: reward +{reward:.3f}" in out


def test_an_evaluation_changes_no_draw_and_is_kept_by_a_resume(place):
    main(run("--reward", "more.py:long", "--held-out", "split=test", output_dir="a"))
    rest = "\n".join(
        row for row in (place / "rows.jsonl").read_text().split("\n") if "test" not in row
    )
    write(place / "rest.jsonl", rest)
    main(run("--reward", "more.py:long", prompts="rest.jsonl", output_dir="b"))
    assert lines(place / "a/samples.jsonl") == lines(place / "b/samples.jsonl")
    before = lines(place / "a/evaluations.jsonl")
    main(["train", "--config", "a/config.yaml", "--resume", "--num-steps", "3"])
    after = lines(place / "a/evaluations.jsonl")
    assert after[:-1] == before
    assert after[-1]["step"] == 3


def test_chats_from_a_file(place):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}:"
    tokenizer.save_pretrained("model")
    chats = [{"messages": [{"role": "user", "content": text}]} for text in PROMPTS]
    write(place / "chats.jsonl", "".join(json.dumps(chat) + "\n" for chat in chats))
    main(arguments(prompts="chats.jsonl"))
    trained = {row["prompt"] for row in lines(place / "run/samples.jsonl")}
    assert trained <= {f"{text}:" for text in PROMPTS}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--held-out", "1.5"], "--held-out: got 1.5, expected a share in (0, 1)"),
        (["--held-out", "split=dev"], "--held-out: the column 'split' reads 'dev' in 0 of 5 rows"),
        (["--held-out", "none.jsonl"], "--held-out: no file none.jsonl"),
        (["--prompt-column", "q"], '--prompts: rows.jsonl line 1 has no "q"; it has the columns q'),
        (["--reward-weights", "1", "2"], "--reward-weights: got 2 weights for 1 rewards (right)"),
        (["--max-prompt-length", "1"], "prompts[0]: 'The film was' has 7 tokens, which exc"),
        (
            ["--reward", "more.py:right", "more.py:long", "--reward-label", "x"],
            "--reward-label: got 'x' for 0 classifiers, expected one",
        ),
    ],
)
def test_bad_flags(place, capsys, flags, message):
    said = fails_in_a_line(capsys, *run("--reward", "more.py:right", *flags))
    assert said.startswith(message)


def test_a_column_that_the_data_lacks_is_found_before_the_first_step(place, capsys):
    said = fails_in_a_line(
        capsys, *run(prompts="prompts.txt", prompt_column=None, reward="more.py:right")
    )
    assert "reward_model right: takes the column 'answer', which the data lacks" in said
    assert not (place / "run/metrics.jsonl").exists()


def test_how_a_classifier_is_read(place, monkeypatch):
    import torch

    from ppo_fast.rewards.classifier import ClassifierReward

    tiny_classifier("gpt2").save_pretrained("liked")
    tiny_tokenizer().save_pretrained("liked")
    made = []
    original = ClassifierReward.__init__

    def noting(self, model, tokenizer, **options):
        original(self, model, tokenizer, **options)
        made.append((next(model.parameters()).dtype, options))

    monkeypatch.setattr(ClassifierReward, "__init__", noting)
    flags = "--reward liked --reward-format pair --reward-cut-completions --reward-dtype bfloat16"
    main(run(*flags.split()))
    expected = {"label": None, "format": "pair", "cut_completions": True}
    assert made == [(torch.bfloat16, expected)]
    assert len(lines(place / "run/metrics.jsonl")) == 2
