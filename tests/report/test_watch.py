"""``ppo-fast watch``: what it shows, and how it follows a run."""

from __future__ import annotations

import io
import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from command_line import fails_in_a_line
from rich.console import Console
from run_folders import START, append, metrics_line, sample_lines, write_config, write_run

from ppo_fast.cli.main import main
from ppo_fast.report.follow import MOST
from ppo_fast.report.terminal import ASCII_BLOCKS, BLOCKS, Picture, sparkline
from ppo_fast.report.watched import Watched


def picture(run, width=100):
    console = Console(file=io.StringIO(), width=width, markup=False, emoji=False)
    console.print(Picture(run))
    return console.file.getvalue()


def watched(folder):
    run = Watched(folder)
    run.update()
    return run


def test_once_prints_one_picture(tmp_path, capsys):
    folder = write_run(tmp_path / "kind", steps=20, every=10)
    before = sorted(path.name for path in folder.iterdir())
    main(["watch", str(folder), "--once"])
    said = capsys.readouterr().out
    main(["watch", str(folder)])  # no terminal
    assert capsys.readouterr().out == said
    head, *rest = said.splitlines()
    assert head.startswith("kind  step 20 of 20")
    assert head.endswith("all steps are done")
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    row = next(line.split() for line in rest if line.startswith("kl_sequence"))
    assert row[1] == f"{last['kl_sequence']:.4g}"
    assert row[3][-1] == "█"
    assert any(line.startswith("evaluated reward") and "at step 20" in line for line in rest)
    assert any("clip_fraction is 0.34" in line for line in rest)
    assert "a sample of step 20" in said
    assert sorted(path.name for path in folder.iterdir()) == before  # it changes nothing


def test_the_mean_is_of_the_last_ten(tmp_path):
    folder = write_run(tmp_path / "run", steps=30, changes=lambda line: line.update(
        mean_reward=float(line["step"])))  # fmt: skip
    row = next(x for x in picture(watched(folder)).splitlines() if x.startswith("mean_reward"))
    assert row.split()[1:3] == ["30", "25.5"]


def test_time_left_is_by_the_last_steps(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(folder, num_steps=100)
    # slow at first, and a night between two of them, before a resume
    times = [START + 1000.0 * s for s in range(10)]
    times += [times[-1] + 50_000.0 + 2.0 * s for s in range(15)]
    for step, at in enumerate(times, 1):
        append(
            folder / "metrics.jsonl", json.dumps({"step": step, "time": at, "entropy": 1}) + "\n"
        )
    run = watched(folder)
    assert run.seconds_a_step() == 2.0
    assert run.seconds_left() == 150.0
    assert "step 25 of 100  2 s a step  2 min left" in picture(run)


def test_a_run_that_says_nothing_for_long(tmp_path, monkeypatch):
    run = watched(write_run(tmp_path / "run", steps=20))
    run.config["num_steps"] = 50
    end = run.courses.time.values[-1]
    monkeypatch.setattr(time, "time", lambda: end + 90)
    assert "No step for" not in picture(run)
    monkeypatch.setattr(time, "time", lambda: end + 600)
    assert "No step for 10 min: has the run ended?" in picture(run)
    run.config["num_steps"] = 20
    assert "No step for" not in picture(run)


def test_it_follows_a_growing_and_a_resumed_run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    run = watched(folder)
    assert "No step is done yet." in picture(run)
    draw = random.Random(0)
    write_config(folder, num_steps=9)
    path, samples = folder / "metrics.jsonl", folder / "samples.jsonl"
    for step in (1, 2, 3):
        append(path, json.dumps(metrics_line(step, 9, draw)) + "\n")
    append(samples, json.dumps(sample_lines(3, 0.3, draw)[0] | {"completion": "three"}) + "\n")
    append(path, '{"step": 4, "ti')
    run.update()
    assert "step 3 of 9" in picture(run)
    assert "three" in picture(run)
    first = path.read_text().splitlines()[0]
    path.write_text(first + "\n")  # resumed from step 1
    samples.write_text("")
    run.update()
    assert run.courses.step == 1
    assert len(run.courses["entropy"]) == 1
    assert "three" not in picture(run)
    append(path, json.dumps(metrics_line(2, 9, draw)) + "\n")
    append(folder / "evaluations.jsonl", json.dumps({"step": 2, "reward": 0.5}) + "\n")
    append(
        folder / "events.jsonl", json.dumps({"step": 2, "level": "INFO", "text": "hello"}) + "\n"
    )
    run.update()
    assert "step 2 of 9" in picture(run)
    assert "evaluated reward  0.5 at step 2" in picture(run)
    assert "step 2  INFO  hello" in picture(run)


def test_a_long_run_is_read_whole(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    text = "".join(f'{{"step": {step}, "entropy": 1}}\n' for step in range(1, 2 * MOST + 2))
    append(folder / "metrics.jsonl", text)
    assert len(watched(folder).courses["entropy"]) == 2 * MOST + 1


def test_no_text_reaches_the_terminal_as_an_instruction(tmp_path):
    bad = "\x1b[2J\x9b31m\x07\x00\u202e\ud800[red]:smile:[/] [link=file:///x]y"
    folder = write_run(tmp_path / "run\x1b[1m", steps=3)
    line = {"step": 3, "prompt": bad, "completion": bad + "z" * 10**6, "score": 1.0}
    (folder / "samples.jsonl").write_text(json.dumps(line) + "\n")
    event = {"step": 3, "level": bad, "source": bad, "text": bad}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    said = json.dumps({"step": 4, f"reward/{bad}/mean": 1.0, "mean_reward": 1}) + "\n"
    append(folder / "metrics.jsonl", said)
    shown = picture(watched(folder))
    assert not set(shown) & set("\x1b\x9b\x07\x00\u202e\ud800")
    assert shown.count("[red]:smile:[/]") >= 3
    assert len(shown) < 10_000


def test_sparklines():
    assert sparkline([0.0, 1.0], BLOCKS) == "▁█"
    assert sparkline([*range(24)], BLOCKS)[0::23] == "▁█"
    assert len(sparkline([*range(1000)], BLOCKS)) == 24
    assert sparkline([0.5], BLOCKS) == sparkline([-9.0], BLOCKS) == "▁"
    assert sparkline([0.0, 1.0], ASCII_BLOCKS).isascii()


def test_a_mean_that_leaves_its_range_is_red(tmp_path):
    folder = write_run(tmp_path / "run", steps=20, changes=lambda line: line.update(
        clip_fraction=0.5, reward_std=0.0))  # fmt: skip
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
    console.print(Picture(watched(folder)))
    shown = console.file.getvalue().splitlines()
    red = [line.split()[0] for line in shown if "\x1b[1;31m" in line]
    assert red == ["reward_std", "clip_fraction"]


def test_folders_that_cannot_be_watched(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert fails_in_a_line(capsys, "watch", str(tmp_path / "no")).startswith("RUN: no folder")
    assert "is a file" in fails_in_a_line(capsys, "watch", str(tmp_path / "file"))
    said = fails_in_a_line(capsys, "watch", str(tmp_path), "--interval", "0")
    assert said == "--interval: got 0, expected seconds in [0.05, 3600]"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_on_a_terminal_it_follows_until_ctrl_c(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(folder, num_steps=7)
    terminal, end = pty.openpty()
    code = "from ppo_fast.cli.main import main; main()"
    command = [sys.executable, "-c", code, "watch", str(folder), "--interval", "0.05"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "50"}
    process = subprocess.Popen(
        command,
        stdin=end,
        stdout=end,
        stderr=end,
        env=environment,
        start_new_session=True,
        # shells start commands in the background with SIGINT ignored, which is inherited
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    os.close(end)
    try:
        said = until(terminal, b"No step is done yet.")
        append(folder / "metrics.jsonl", json.dumps(metrics_line(1, 7, random.Random(0))) + "\n")
        said += until(terminal, b"step 1 of 7")
        process.send_signal(signal.SIGINT)
        ends = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < ends:
            said += rest_of(terminal)  # a full terminal would block the process
            time.sleep(0.01)
        assert process.poll() == 130
        said += rest_of(terminal)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert b"Traceback" not in said
    assert b"ppo-fast:" not in said
    assert b"\x1b[?25h" in said  # the cursor is back


def until(terminal, words):
    """Read from a terminal until it has shown some words."""
    said = b""
    while words not in said:
        ready, _, _ = select.select([terminal], [], [], 30)
        assert ready, said
        said += os.read(terminal, 65536)
    return said


def rest_of(terminal):
    said = b""
    while select.select([terminal], [], [], 0)[0]:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
    return said
