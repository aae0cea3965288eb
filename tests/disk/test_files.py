"""Files and folders appear whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from tiny_trainer import PROMPTS, tiny_trainer

from ppo_fast.disk import files
from ppo_fast.disk.files import remove_partial, written, written_folder
from ppo_fast.run_folder.folder import RunFolder


def test_a_file_gets_its_name_when_it_is_on_the_disk(tmp_path, monkeypatch):
    calls = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("replace"), replace(*a)))
    with written(tmp_path / "a") as file:
        file.write(b"new")
    assert calls == ["sync", "replace", "sync"], "the file, its name, the folder's entry"
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_new_file_can_be_read_as_others_of_the_user(tmp_path):
    before = os.umask(0o027)
    try:
        with written(tmp_path / "a") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def broken_off(block, write):
    """Leave a block by an error after ``write``."""
    with block as new:
        write(new)
        raise OSError("full")


def test_a_file_that_breaks_off_changes_nothing(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="full"):
        broken_off(written(tmp_path / "a"), lambda file: file.write(b"half"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    for text in ("old", "new"):
        with written_folder(tmp_path / "policy") as new:
            (new / "deep").mkdir()
            (new / "deep" / "weights").write_text(text)
    assert (tmp_path / "policy" / "deep" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    with pytest.raises(OSError, match="full"):
        broken_off(written_folder(tmp_path / "policy"), lambda new: (new / "half").write_text(""))
    assert [path.name for path in (tmp_path / "policy").iterdir()] == ["deep"]
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


@pytest.mark.skipif(sys.platform != "linux", reason="the exchange of names is Linux's")
def test_a_folder_is_never_missing_while_it_is_replaced(tmp_path):
    target, missing, done = tmp_path / "policy", [], threading.Event()
    with written_folder(target) as new:
        (new / "weights").write_text("0")

    def look():
        while not done.is_set():
            if not (target / "weights").exists():
                missing.append(1)

    thread = threading.Thread(target=look)
    thread.start()
    for number in range(60):
        with written_folder(target) as new:
            (new / "weights").write_text(str(number))
    done.set()
    thread.join()
    assert not missing


def test_what_killed_runs_leave_is_removed(tmp_path):
    code = (
        "import sys; from pathlib import Path; from ppo_fast.disk.files import *\n"
        "with written_folder(Path(sys.argv[1]) / 'policy') as new, "
        "written(Path(sys.argv[1]) / 'a') as file:\n"
        "    (new / 'half').write_text(''); print('ready', flush=True); import time; time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 2, "both half written"
    (tmp_path / "mine.partial").write_text("of the user")
    (tmp_path / "metrics.jsonl").write_text("")
    with RunFolder(tmp_path):
        pass
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {".lock", "metrics.jsonl", "mine.partial"}
    remove_partial(tmp_path / "none")


def test_half_written_checkpoints_are_removed(tmp_path):
    half = tmp_path / ".ppo_fast-ppo_checkpoint_step_3.pt1234.partial"
    half.write_text("half")
    tiny_trainer().train(PROMPTS, 1, 2, checkpoint_dir=tmp_path, progress=False)
    assert not half.exists()


def test_lines_of_later_steps_and_half_lines_are_forgotten(tmp_path):
    lines = [json.dumps({"step": n, "text": "ä"}) for n in (1, 2, 2, 3)]
    content = ("\n".join(lines) + '\n{"step": 2, "text": "').encode() + "ä".encode()[:1]
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_bytes(content)
    with RunFolder(tmp_path) as folder:
        folder.forget_after(2)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / name).read_text("utf-8").splitlines() == lines[:3]


def test_lines_are_on_the_disk(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append(time.monotonic()))
    with RunFolder(tmp_path) as folder:
        folder.write_metrics(1, {"a": 1.0})
    assert len(calls) == 1
