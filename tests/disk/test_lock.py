"""One run at a time in an output folder."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest
from filelock import FileLock

from ppo_fast.disk import lock
from ppo_fast.run_folder.folder import RunFolder

HOLD = """
import sys
from pathlib import Path
from ppo_fast.disk.lock import FolderLock
held = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_run_in_a_folder_is_refused_by_name(tmp_path):
    with RunFolder(tmp_path):
        expected = rf"{re.escape(str(tmp_path))} is in use by another run, process {os.getpid()} "
        with pytest.raises(RuntimeError, match=expected):
            RunFolder(tmp_path)
        with RunFolder(tmp_path / "other"):
            pass
    with RunFolder(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "other"}


def test_a_killed_process_leaves_no_lock(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):  # the first refusal takes nothing from the second
            with pytest.raises(RuntimeError, match=f"process {holder.pid} on "):
                RunFolder(tmp_path)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with RunFolder(tmp_path):
        pass


def test_a_process_that_has_not_written_its_name_yet(tmp_path):
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(RuntimeError, match="in use by another run, a process that is just starting"),
    ):
        RunFolder(tmp_path)


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    class NoLock(FileLock):
        def acquire(self, *args, **kwargs):
            raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(lock, "FileLock", NoLock)
    with RunFolder(tmp_path):
        assert "cannot be locked: start no other run in it" in caplog.text
