"""Lines of a run's folder: their form, what a resumed run drops, a disk that is full."""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from bos_tokenizer import sentencepiece_like
from command_line import lines
from tiny_models import EOS, VOCAB_SIZE, tiny_tokenizer

from ppo_fast import Rollout
from ppo_fast.data.evaluated import Evaluated
from ppo_fast.data.scores import Scores
from ppo_fast.data.step import Step
from ppo_fast.run_folder import line_files
from ppo_fast.run_folder.folder import RunFolder
from ppo_fast.run_folder.run_writer import RunWriter
from ppo_fast.run_folder.sample_lines import token_texts

NAMES = ("metrics", "samples", "evaluations", "evaluation_samples", "events")


def rollout_of(tokenizer, rows, **options):
    """Prompts and completions, each completion with an EOS."""
    prompts = [tokenizer(p)["input_ids"] for p, _ in rows]
    responses = [[*tokenizer(c)["input_ids"], tokenizer.eos_token_id] for _, c in rows]
    made = Rollout.from_tokens(prompts, responses, **options)
    made.prompts[:], made.completions[:] = zip(*rows, strict=True)
    return made


def step_of(number=1, count=2, tokenizer=None, **options):
    rows = [(f"The film {i}", " was naïve 💡" + "." * i) for i in range(count)]
    rollout = rollout_of(tokenizer or tiny_tokenizer(), rows, **options)
    shape = rollout.tokens.response_ids.shape
    numbers = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape) / 3
    return Step(
        number,
        {"mean_reward": 1.0, "bad": math.nan},
        rollout,
        torch.arange(count, dtype=torch.float32),
        {"a": torch.full((count,), math.nan), "b": torch.ones(count)},
        {"log_ratio": numbers, "advantage": -numbers},
    )


def evaluated_of(step, count=2):
    rollout = step_of(count=count).rollout
    scores = Scores(
        torch.ones(count, rollout.tokens.response_ids.shape[1]), {"a": torch.ones(count)}
    )
    return Evaluated(step, {"reward": 0.5, "reward/a/mean": math.inf}, rollout, scores)


def steps_in(folder, name):
    return [row["step"] for row in lines(folder / f"{name}.jsonl")]


@pytest.fixture
def full(monkeypatch):
    """Whether the disk is full."""
    is_full, write = [False], os.write

    def writing(handle, data):
        if is_full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data)

    monkeypatch.setattr(line_files.os, "write", writing)
    return is_full


# Form


def test_a_step_s_lines(tmp_path):
    step = step_of(count=5, columns={"answer": [1, {2}, math.nan, "x", None]})
    with RunFolder(tmp_path) as folder:
        folder.write_metrics(1, step.metrics)
        folder.write_samples(step, tiny_tokenizer())
    (metrics,) = lines(tmp_path / "metrics.jsonl")
    assert metrics.keys() == {"step", "time", "mean_reward", "bad"}
    assert metrics["bad"] is None
    rows = lines(tmp_path / "samples.jsonl")
    assert [row["score"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[1]["rewards"] == {"a": None, "b": 1.0}
    assert [row["columns"]["answer"] for row in rows] == [1, "{2}", "nan", "x", None]
    assert ["tokens" in row for row in rows] == [True] * 4 + [False]
    lengths = step.rollout.tokens.response_lengths.tolist()
    for i, row in enumerate(rows[:4]):
        tokens = row["tokens"]
        assert "".join(tokens["text"]) == row["completion"] + EOS
        assert {len(numbers) for numbers in tokens.values()} == {lengths[i]}
        expected = step.per_token["log_ratio"][i, : lengths[i]]
        assert tokens["log_ratio"] == pytest.approx(expected.tolist(), rel=5e-4)
        assert all(len(repr(abs(x))) <= 7 for x in tokens["log_ratio"]), "four digits"
    assert "value" not in tokens, "without a value function"


def test_no_tokens_without_a_tokenizer(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.write_samples(step_of())
    assert all("tokens" not in row for row in lines(tmp_path / "samples.jsonl"))


def test_an_evaluation_s_lines(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.write_evaluation(evaluated_of(0))
        folder.write_evaluation(evaluated_of(3))
    first, second = lines(tmp_path / "evaluations.jsonl")
    assert first.keys() == {"step", "time", "reward", "reward/a/mean"}
    assert (first["step"], second["step"], second["reward/a/mean"]) == (0, 3, None)
    rows = lines(tmp_path / "evaluation_samples.jsonl")
    assert [row["step"] for row in rows] == [0, 0, 3, 3]
    length = step_of().rollout.tokens.response_ids.shape[1]
    assert rows[0]["score"] == length, "of scores [B, T] it is the sum"
    assert rows[0]["prompt"] == "The film 0"


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), sentencepiece_like()])
@pytest.mark.parametrize("completion", [" was naïve 💡💡 über", "film", "  two  spaces ", "日本語"])
def test_texts_of_tokens_join_to_the_text(tokenizer, completion):
    prompt = tokenizer("The", add_special_tokens=False)["input_ids"]
    both = tokenizer("The" + completion, add_special_tokens=False)["input_ids"]
    if both[: len(prompt)] != prompt:
        pytest.skip("the tokens of the prompt are others")
    response = both[len(prompt) :]
    texts = token_texts(tokenizer, prompt, response)
    assert len(texts) == len(response)
    whole = tokenizer.decode(both, clean_up_tokenization_spaces=False)
    assert "".join(texts) == whole[len(tokenizer.decode(prompt)) :]
    if "💡" not in whole and "日" not in whole:
        return
    assert all("\N{REPLACEMENT CHARACTER}" not in text for text in texts)


def test_texts_of_any_bytes_join_to_the_text():
    tokenizer, draw = tiny_tokenizer(), torch.Generator().manual_seed(0)
    for _ in range(20):
        prompt = tokenizer("The film was")["input_ids"]
        ids = torch.randint(2, VOCAB_SIZE, (40,), generator=draw).tolist()
        texts = token_texts(tokenizer, prompt, ids)
        assert "The film was" + "".join(texts) == tokenizer.decode([*prompt, *ids])


def test_the_last_token_of_a_character_has_it():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("é!")["input_ids"]
    assert len(ids) == 3, "two bytes, and one"
    assert token_texts(tokenizer, ids, ids) == ["", "é", "!"]
    broken = token_texts(tokenizer, ids, ids[:1])
    assert broken == ["\N{REPLACEMENT CHARACTER}"], "a response that ends amid a character"


class Shown(list):
    show = list.append


def test_the_run_writer_writes_and_shows_steps_and_evaluations(tmp_path, full):
    shown = Shown()
    with RunFolder(tmp_path) as folder:
        writer = RunWriter(folder, shown, tiny_tokenizer())
        writer.on_start({}, 0)
        writer.on_evaluate(evaluated_of(0))
        step = step_of(1)
        full[0] = True
        writer.on_step(step)
        full[0] = False
        writer.on_save(1, tmp_path / "checkpoint")
        assert steps_in(tmp_path, "metrics") == [1], "on the disk before a checkpoint counts on it"
        RunWriter(folder).on_step(step_of(2))
        writer.on_end({})
    assert shown == [step]
    assert steps_in(tmp_path, "evaluations") == [0]
    assert ["tokens" in row for row in lines(tmp_path / "samples.jsonl")] == [True] * 2 + [
        False
    ] * 2


# A resumed run


def fill(path, steps=(1, 2, 3)):
    with RunFolder(path) as folder:
        folder.write_evaluation(evaluated_of(0))
        for number in steps:
            folder.write_metrics(number, {"a": 1.0})
            folder.write_samples(step_of(number))
            folder.write_evaluation(evaluated_of(number))
            logging.getLogger("ppo_fast.test").warning("at %d", number)


def test_a_resumed_run_drops_later_lines_of_every_file(tmp_path):
    fill(tmp_path)
    for name in NAMES:  # a killed run can leave the last line half written
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 1, "x')
    with RunFolder(tmp_path) as folder:
        folder.forget_after(2)
        logging.getLogger("ppo_fast.test").warning("mine")
        folder.write_metrics(3, {"a": 1.0})
    assert steps_in(tmp_path, "metrics") == [1, 2, 3]
    assert steps_in(tmp_path, "samples") == [1, 1, 2, 2]
    assert steps_in(tmp_path, "evaluations") == [0, 1, 2]
    assert steps_in(tmp_path, "evaluation_samples") == [0, 0, 1, 1, 2, 2]
    events = lines(tmp_path / "events.jsonl")
    assert [(e["step"], e["text"]) for e in events] == [
        (1, "at 1"),
        (2, "at 2"),
        (2, "resumed after step 2"),
        (2, "mine"),
    ]


def test_a_run_that_begins_anew_drops_everything(tmp_path):
    fill(tmp_path)
    with RunFolder(tmp_path) as folder:
        folder.forget_after(0)
    assert all((tmp_path / f"{name}.jsonl").read_bytes() == b"" for name in NAMES)


def test_samples_of_an_evaluation_that_did_not_end_are_dropped(tmp_path):
    fill(tmp_path)
    path = tmp_path / "evaluations.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    with RunFolder(tmp_path) as folder:
        folder.forget_after(2)
        folder.write_evaluation(evaluated_of(2))
    assert steps_in(tmp_path, "evaluations") == [0, 1, 2]
    assert steps_in(tmp_path, "evaluation_samples") == [0, 0, 1, 1, 2, 2]


def test_dropping_the_last_lines_takes_no_space(tmp_path, monkeypatch):
    fill(tmp_path)

    def written(path):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("ppo_fast.run_folder.forget.written", written)
    with RunFolder(tmp_path) as folder:
        folder.forget_after(1)
    assert steps_in(tmp_path, "metrics") == [1]


def test_lines_between_others_are_dropped_and_a_line_break_is_added(tmp_path):
    text = '{"step": 1}\n{"step": 5}\nnoise\n[]\n{"step": "x"}\n{"step": 2}'
    (tmp_path / "metrics.jsonl").write_text(text)
    with RunFolder(tmp_path) as folder:
        folder.forget_after(2)
        folder.write_metrics(3, {})
    assert steps_in(tmp_path, "metrics") == [1, 2, 3]


def test_a_last_line_without_a_line_break_gets_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    with RunFolder(tmp_path) as folder:
        folder.forget_after(2)
        folder.write_metrics(3, {})
    assert steps_in(tmp_path, "metrics") == [1, 2, 3]


def test_missing_lines_are_told(tmp_path, caplog):
    fill(tmp_path, steps=(1, 3))
    with RunFolder(tmp_path) as folder:
        folder.forget_after(3)
    assert f"{tmp_path / 'metrics.jsonl'} has lines of 2 of 3 steps" in caplog.text


# Warnings


def test_a_run_goes_on_when_the_disk_is_full_and_no_line_is_lost(tmp_path, full, caplog):
    with RunFolder(tmp_path) as folder:
        for number in range(1, 6):
            full[0] = number in (2, 3, 4)
            folder.write_metrics(number, {"a": 1.0})
            folder.write_samples(step_of(number))
    assert steps_in(tmp_path, "metrics") == [1, 2, 3, 4, 5]
    assert steps_in(tmp_path, "samples") == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    events = lines(tmp_path / "events.jsonl")
    assert [event["step"] for event in events] == [2, 5]
    assert "lines wait in memory" in events[0]["text"]
    assert caplog.text.count("lines wait in memory") == 1


def test_lines_that_wait_at_the_end_are_an_error(tmp_path, full):
    folder = RunFolder(tmp_path)
    full[0] = True
    folder.write_metrics(1, {})
    with pytest.raises(OSError, match=r"^output_dir: the last lines of .* could not be written"):
        folder.close()
    with RunFolder(tmp_path):
        pass  # the lock is given up all the same


def test_they_do_not_hide_why_a_run_ends(tmp_path, full, caplog):
    def end():
        with RunFolder(tmp_path) as folder:
            full[0] = True
            folder.write_metrics(1, {})
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        end()
    assert "the last lines of" in caplog.text


def test_a_folder_that_is_removed_stays_so(tmp_path, caplog):
    run = tmp_path / "run"
    folder = RunFolder(run)
    folder.write_metrics(1, {})
    shutil.rmtree(run)
    folder.write_metrics(2, {})
    assert not run.exists()
    with pytest.raises(OSError, match="the last lines of"):
        folder.close()
    assert not run.exists()


# A process that is killed

KILLED = """
import os, signal, sys
from pathlib import Path
from ppo_fast.run_folder import line_files
from ppo_fast.run_folder.folder import RunFolder

run, write = Path(sys.argv[1]), os.write

def part(kill_at):
    calls = 0
    def killing(handle, data):
        nonlocal calls
        calls += 1
        if calls == kill_at:
            write(handle, bytes(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(handle, data)
    line_files.os.write = killing
    checkpoint = run / "checkpoint"
    done = int(checkpoint.read_text()) if checkpoint.exists() else 0
    folder = RunFolder(run)
    folder.forget_after(done)
    for number in range(done + 1, 6):
        folder.write_metrics(number, {"a": 1.0})
        folder._append({"samples.jsonl": [{"step": number}] * 2})
        checkpoint.write_text(str(number))

for kill_at in (3, 4, 1, 2, 99):  # amid metrics, amid samples, ...
    child = os.fork()
    if child == 0:
        part(kill_at)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is of Unix")
def test_after_kills_no_step_is_missing_or_double(tmp_path):
    run = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)]
    said = subprocess.run(run, check=True, capture_output=True, text=True)
    assert said.stdout.split() == ["-9"] * 4 + ["0"]
    assert steps_in(tmp_path, "metrics") == [1, 2, 3, 4, 5]
    assert steps_in(tmp_path, "samples") == [n for n in range(1, 6) for _ in range(2)]
