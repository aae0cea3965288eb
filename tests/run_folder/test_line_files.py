"""Lines that cannot be written wait, are never torn, and come in their order."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading

import pytest

from ppo_fast.run_folder import line_files
from ppo_fast.run_folder.line_files import LineFiles

NAMES = ("metrics", "samples")


@pytest.fixture
def files(tmp_path):
    return LineFiles(tmp_path, NAMES, droppable=("samples",))


@pytest.fixture
def disk(monkeypatch):
    """A disk with ``disk[0]`` bytes left; None: as many as one likes."""
    left, write = [None], os.write

    def writing(handle, data):
        if left[0] is None:
            return write(handle, data)
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(handle, bytes(data)[: left[0]])  # part of it, as a real one does
        left[0] -= done
        return done

    monkeypatch.setattr(line_files.os, "write", writing)
    return left


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records]


def text(folder, name="metrics"):
    return (folder / name).read_text("utf-8")


def test_lines_wait_for_a_full_disk_and_come_in_their_order(tmp_path, files, disk, caplog):
    files.append({"metrics": ["a" * 10]})
    disk[0] = 15
    files.append({"metrics": ["b" * 10]})
    disk[0] = 4
    files.append({"metrics": ["c" * 10]})
    assert text(tmp_path) == "a" * 10 + "\nbbbbbbbbbb\n", "no part of a line stays"
    assert files.failed.errno == errno.ENOSPC
    for letter in "de":
        disk[0] = 0
        files.append({"metrics": [letter * 10], "samples": [letter]})
    (said,) = warnings_of(caplog)
    assert said.startswith(f"output_dir: {tmp_path} cannot be written ([Errno 28] No space left")
    assert "its lines wait in memory" in said
    disk[0] = None
    assert files.flush() is None
    assert text(tmp_path).split() == [letter * 10 for letter in "abcde"]
    assert text(tmp_path, "samples").split() == ["d", "e"]
    assert "can be written again; all lines that waited are in its files" in warnings_of(caplog)[1]
    disk[0] = 0
    files.append({"metrics": ["f"]})
    assert len(warnings_of(caplog)) == 3, "a warning an outage"


def test_part_of_a_line_that_cannot_be_cut_at_once_is_cut_later(tmp_path, files, disk, monkeypatch):
    files.append({"metrics": ["first"]})
    cut = os.ftruncate

    def cutting(handle, size):
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(line_files.os, "ftruncate", cutting)
    disk[0] = 3
    files.append({"metrics": ["second"]})
    assert text(tmp_path) == "first\nsec"
    monkeypatch.setattr(line_files.os, "ftruncate", cut)
    disk[0] = None
    files.append({"metrics": ["third"]})
    assert text(tmp_path) == "first\nsecond\nthird\n"


def test_an_interrupt_tears_no_line(tmp_path, files, monkeypatch):
    files.append({"metrics": ["first"]})
    write = os.write

    def interrupted(handle, data):
        write(handle, bytes(data)[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(line_files.os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.append({"metrics": ["second"]})
    assert text(tmp_path) == "first\n"
    monkeypatch.setattr(line_files.os, "write", write)
    files.flush()
    assert text(tmp_path) == "first\nsecond\n"


def test_a_folder_that_is_gone_is_not_made_again(tmp_path, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    files = LineFiles(folder, NAMES)
    files.append({"metrics": ["1"]})
    (folder / "metrics").unlink()
    folder.rmdir()
    files.append({"metrics": ["2"]})
    assert not folder.exists()
    assert isinstance(files.failed, FileNotFoundError)
    folder.mkdir()
    files.append({"metrics": ["3"]})
    assert text(folder).split() == ["2", "3"]
    assert f"{folder / 'metrics'}: something else removed or shortened it" in warnings_of(caplog)


def test_a_read_only_folder(tmp_path, caplog):
    files = LineFiles(tmp_path, NAMES)
    (tmp_path / "metrics").mkdir()  # cannot be opened, not even by root
    files.append({"metrics": ["1"], "samples": ["2"]})
    assert text(tmp_path, "samples") == "2\n", "other files are written all the same"
    (tmp_path / "metrics").rmdir()
    assert files.flush() is None
    assert text(tmp_path) == "1\n"


def test_samples_are_dropped_beyond_the_limit_and_metrics_are_not(
    tmp_path, files, disk, monkeypatch, caplog
):
    monkeypatch.setattr(line_files, "LIMIT", 100)
    disk[0] = 0
    for number in range(20):
        files.append({"metrics": [f"m{number}"], "samples": [f"s{number} " + "x" * 20] * 2})
    said = warnings_of(caplog)
    assert len(said) == 2
    assert "lines of samples are dropped until" in said[1]
    disk[0] = None
    files.append({"metrics": ["last"], "samples": ["last"]})
    assert text(tmp_path).split() == [*(f"m{n}" for n in range(20)), "last"]
    kept = [line.split()[0] for line in text(tmp_path, "samples").splitlines()]
    assert kept == ["s0", "s0", "s1", "s1", "last"]
    assert "but 36 lines of samples" in warnings_of(caplog)[-1]
    files.append({"samples": ["after"]})
    assert text(tmp_path, "samples").splitlines()[-1] == "after"


def test_warnings_that_become_lines_do_not_lock_threads(tmp_path, disk):
    """A handler that writes lines is called by two threads while writing fails."""
    files, logger = LineFiles(tmp_path, ("metrics", "events")), logging.getLogger("ppo_fast.test")

    class Handler(logging.Handler):
        def emit(self, record):
            files.append({"events": [record.getMessage()]})

    handler, disk[0] = Handler(), 0
    logging.getLogger("ppo_fast").addHandler(handler)
    try:

        def write(number):
            for i in range(50):
                disk[0] = None if i % 2 else 0
                files.append({"metrics": [f"{number}"]})
                logger.warning("event")

        threads = [threading.Thread(target=write, args=(n,), daemon=True) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
    finally:
        logging.getLogger("ppo_fast").removeHandler(handler)
    disk[0] = None
    files.flush()
    assert len(text(tmp_path).split()) == 150
    assert text(tmp_path, "events").split().count("event") == 150


@pytest.mark.skipif(sys.platform == "win32", reason="limits of files are of Unix")
def test_a_real_limit_of_the_system(tmp_path):
    """The system writes part of a line, and then says that the file is too large."""
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from ppo_fast.run_folder.line_files import LineFiles\n"
        "files = LineFiles(Path(sys.argv[1]), ('metrics',))\n"
        "files.append({'metrics': ['a' * 30]})\n"
        "hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))\n"
        "files.append({'metrics': ['b' * 30]})\n"
        "print(files.failed.strerror, Path(sys.argv[1], 'metrics').stat().st_size)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))\n"
        "files.append({'metrics': ['c' * 30]})\n"
    )
    run = [sys.executable, "-c", code, str(tmp_path)]
    said = subprocess.run(run, capture_output=True, text=True, check=True)
    assert said.stdout == "File too large 31\n"
    assert text(tmp_path).split() == ["a" * 30, "b" * 30, "c" * 30]


@pytest.mark.parametrize("call", ["open", "fstat", "write", "fsync", "close"])
def test_a_signal_amid_a_write_doubles_no_line(tmp_path, monkeypatch, call):
    """Its handler logs a warning, which becomes a line while another is being written."""
    files, real, fired = LineFiles(tmp_path, ["metrics", "events"]), getattr(os, call), []

    def interrupted(*arguments):
        result = real(*arguments)
        if not fired:
            fired.append(call)
            files.append({"events": ["stopping"], "metrics": ["late"]})
        return result

    monkeypatch.setattr(os, call, interrupted)
    files.append({"metrics": ["1"]})
    files.append({"metrics": ["2"]})
    assert (tmp_path / "metrics").read_text() == "1\nlate\n2\n"
    assert (tmp_path / "events").read_text() == "stopping\n"
