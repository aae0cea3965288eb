"""Folders of runs as the report reads them, whole, damaged and large."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest
from command_line import fails_in_a_line
from run_folders import append, write_config, write_lines, write_run

from ppo_fast.report import follow, lines
from ppo_fast.report.follow import Follower
from ppo_fast.report.page import page
from ppo_fast.report.read import read_runs


def read(folder):
    (run,) = read_runs([folder])
    return run


def test_a_whole_folder(tmp_path):
    run = read(write_run(tmp_path / "kind", steps=30, every=10))
    assert run.name == "kind"
    assert run.courses.step == 30
    assert [*run.courses["kl_sequence"].steps] == [*range(1, 31)]
    assert 3 not in run.courses["explained_variance"].steps  # null
    assert [one["step"] for one in run.evaluations] == [0, 10, 20, 30]
    assert {one["step"] for one in run.samples.first} == {1}
    assert {one["step"] for one in run.samples.last} == {30}
    assert len(run.evaluation_samples.first) == len(run.evaluation_samples.last) == 6
    assert run.evaluation_samples.first[0]["step"] == 0
    assert run.config["learning_rate"] == 2e-4
    assert run.event_count == len(run.events) == 2


def test_lines_that_are_no_step_are_skipped(tmp_path):
    """Half lines, other JSON, numbers that JSON does not have or that cannot be drawn."""
    folder = tmp_path / "run"
    folder.mkdir()
    parts = [
        '{"step": 1, "a": 1.0, "b": null, "c": "text", "d": true, "e": [1]}', "", "{", "[1]", "7",
        '{"a": 2}', '{"step": "2", "a": 2}', '{"step": true, "a": 2}', '{"step": -1, "a": 2}',
        '{"step": 2.0, "a": 2}', '{"step": 3, "a": NaN, "b": Infinity, "c": 1e999, "f": 1e200}',
        "[" * 100_000, '{"step": ' + "9" * 5000 + "}", '{"step": 4, "a": ' + "9" * 400 + "}",
        '{"step": 5, "a": 5.0}', '{"step": 6, "a": 6',
    ]  # fmt: skip
    text = "\n".join(parts).encode() + b"\xff\xfe\x00"
    (folder / "metrics.jsonl").write_bytes(text)
    run = read(folder)
    assert {name: ([*c.steps], [*c.values]) for name, c in run.courses.by_name.items()} == {
        "a": ([1, 5], [1.0, 5.0])
    }
    assert run.courses.step == 5
    page([run])


def test_a_step_that_is_done_again_replaces_later_ones(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    found = [{"step": s, "time": s, "a": float(s)} for s in (1, 2, 3, 4)]
    found += [{"step": s, "time": s, "a": 10.0 * s} for s in (3, 4)]
    write_lines(folder / "metrics.jsonl", [*found, {"step": 5, "b": 1}])
    run = read(folder)
    assert [*run.courses["a"].values] == [1.0, 2.0, 30.0, 40.0]
    assert [*run.courses.time.steps] == [1, 2, 3, 4]
    assert [*run.courses["b"].steps] == [5]


def test_samples_are_read_from_the_ends_alone(tmp_path, monkeypatch):
    """Of a file of any size, and in bounded memory."""
    monkeypatch.setattr(lines, "LONGEST", 4000)
    folder = write_run(tmp_path / "run", steps=5)
    found = [{"step": s, "prompt": f"{s}.{i}", "completion": "x" * 100} for s in range(1, 101)
             for i in range(4)]  # fmt: skip
    write_lines(folder / "samples.jsonl", found)
    append(folder / "samples.jsonl", '{"step": 101, "prompt": "half')
    run = read(folder)
    assert [one["prompt"] for one in run.samples.first] == ["1.0", "1.1", "1.2", "1.3"]
    assert [one["prompt"] for one in run.samples.last] == ["100.0", "100.1", "100.2", "100.3"]
    write_lines(folder / "samples.jsonl", [{"step": 1, "prompt": "x" * 5000}, found[8], found[9]])
    run = read(folder)  # a line that is too long is as none
    assert [one["prompt"] for one in run.samples.first] == ["3.0", "3.1"]


def test_samples_of_a_step_that_begins_where_reading_does(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LONGEST", 1000)
    path = tmp_path / "samples.jsonl"
    found = [{"step": s, "prompt": "x" * 73} for s in (10, 20) for _ in range(10)]
    assert write_lines(path, found).stat().st_size == 2000
    assert len(lines.last_step(path)) == 10


def test_numbers_that_json_does_not_have_are_none():
    assert lines.record_of(b'{"step": 1, "a": NaN, "b": -Infinity}') == {
        "step": 1, "a": None, "b": None,
    }  # fmt: skip


def test_evaluations_are_in_order_and_the_last_of_a_step_counts(tmp_path):
    folder = write_run(tmp_path / "run", steps=5)
    found = [{"step": s, "reward": r} for s, r in ((10, 1.0), (0, 2.0), (10, "x"), (5, 3.0))]
    write_lines(folder / "evaluations.jsonl", found)
    assert read(folder).evaluations == [
        {"step": 0, "reward": 2.0}, {"step": 5, "reward": 3.0}, {"step": 10, "reward": None},
    ]  # fmt: skip


def test_a_line_in_parts_is_no_shorter_line(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LONGEST", 50)
    path = tmp_path / "a.jsonl"
    path.write_text(" " * 50 + '{"step": 1}\n' + '{"step": 2}\n' + '{"step": 3}')
    assert [one["step"] for one in lines.records(path)] == [2, 3]


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "evaluation_samples.jsonl",
             "events.jsonl", "config.yaml"],
)  # fmt: skip
@pytest.mark.parametrize("contents", [None, b"", b"\n\n", b"\xff\xfe{", b"- 1\n- [", b"null"])
def test_a_file_that_is_missing_or_damaged(tmp_path, name, contents):
    folder = write_run(tmp_path / "run", steps=5)
    (folder / name).unlink()
    if contents is not None:
        (folder / name).write_bytes(contents)
    assert "<h2>Summary</h2>" in page(read_runs([folder]))


@pytest.mark.parametrize("value", ["0x" + "f" * 9000, "2026-11-27", ".nan", "{a: {b: [1]}}",
                                   "&a [1, *a]", "!!binary aGk=", "~", "[]", "''"])  # fmt: skip
def test_values_of_a_config(tmp_path, value):
    folder = write_run(tmp_path / "run", steps=5)
    keys = ("policy", "num_steps", "batch_size", "learning_rate", "other", "adam_betas")
    text = "".join(f"{key}: {value}\n" for key in keys)
    (folder / "config.yaml").write_text(text)
    assert "<h2>Summary</h2>" in page(read_runs([folder]))


def test_folders_that_are_no_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    write_run(tmp_path / "run", steps=3)
    said = fails_in_a_line(capsys, "report", "nowhere")
    assert said == "RUN: no folder nowhere"
    assert "is a file; name the folder" in fails_in_a_line(capsys, "report", "file")
    said = fails_in_a_line(capsys, "report", "empty", "run")
    assert said.startswith("RUN: empty holds no run: it has none of config.yaml, metrics.jsonl")
    assert "is named twice" in fails_in_a_line(capsys, "report", "run", "./run")
    assert "got 0 folders, expected 1 to 12" in fails_in_a_line(capsys, "report")
    said = fails_in_a_line(capsys, "report", "run", "--output", "empty")
    assert said.startswith("--output: empty is a folder")
    assert "expected 1 to 12" in fails_in_a_line(capsys, "report", *map(str, range(13)))


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / part / "run", steps=2) for part in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run"]


def test_a_long_run_is_thinned(tmp_path):
    """A peak in 20,000 steps is drawn; the page of eight metrics stays small."""
    folder = tmp_path / "long"
    folder.mkdir()
    write_config(folder, num_steps=20_000)
    draw = random.Random(0)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 20_001):
            line = {"step": step, "mean_reward": draw.random(), "entropy": 2.0 + draw.random()}
            line["entropy"] = 9.5 if step == 12_345 else line["entropy"]
            file.write(json.dumps(line) + "\n")
    made = page(read_runs([folder]))
    assert "[12345,9.5]" in made
    assert len(made.encode()) < 150_000


def test_a_follower_reads_what_is_new(tmp_path):
    path = tmp_path / "a.jsonl"
    follower = Follower(path)
    assert follower.read() == (False, [])
    append(path, '{"step": 1}\n{"step": 2}\n{"st')
    assert follower.read() == (False, [{"step": 1}, {"step": 2}])
    assert follower.read() == (False, [])
    append(path, 'ep": 3}\nno JSON\n')
    assert follower.read() == (False, [{"step": 3}])


def test_a_follower_begins_anew_where_the_file_is_another(tmp_path):
    path = tmp_path / "a.jsonl"
    follower = Follower(path)
    append(path, '{"step": 1, "a": 1}\n{"step": 2, "a": 1}\n{"step": 3, "a": 1}\n')
    follower.read()
    path.write_text('{"step": 1, "a": 1}\n')  # shorter
    assert follower.read() == (True, [{"step": 1, "a": 1}])
    append(path, '{"step": 2, "a": 2}\n')
    assert follower.read() == (False, [{"step": 2, "a": 2}])
    other = tmp_path / "b.jsonl"  # as long, of the same steps
    append(other, '{"step": 1, "a": 1}\n{"step": 2, "a": 3}\n{"step": 3, "a": 3}\n')
    os.replace(other, path)
    assert [one["a"] for one in follower.read()[1]] == [1, 3, 3]
    path.unlink()
    assert follower.read() == (False, [])
    append(path, '{"step": 9}\n')
    assert follower.read() == (True, [{"step": 9}])


def test_a_follower_returns_a_bounded_number_of_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "MOST", 3)
    follower = Follower(write_lines(tmp_path / "a.jsonl", [{"step": s} for s in range(7)]))
    assert [len(follower.read()[1]) for _ in range(4)] == [3, 3, 1, 0]


def test_a_follower_of_the_end_of_a_file(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"step": s} for s in range(100, 200)])
    follower = Follower(path, tail=50)
    assert follower.read() == (False, [{"step": s} for s in (197, 198, 199)])
    append(path, '{"step": 200}\n')
    assert follower.read() == (False, [{"step": 200}])


@pytest.mark.parametrize("command", ["report", "watch"])
def test_the_commands_load_no_torch_and_no_network(tmp_path, command):
    folder = write_run(tmp_path / "run", steps=5)
    code = (
        "import sys; from ppo_fast.cli.main import main; main(sys.argv[1:]);"
        "print(*{'torch', 'numpy', 'transformers', 'urllib.request'} & {*sys.modules},"
        " file=sys.stderr)"
    )
    arguments = [sys.executable, "-c", code, command, str(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""
