"""Warnings of a run as lines of events.jsonl."""

from __future__ import annotations

import logging
import subprocess
import sys

from command_line import lines

from ppo_fast.run_folder.folder import RunFolder


def test_warnings_become_events_between_enter_and_close(tmp_path):
    logger = logging.getLogger("ppo_fast.runs.health")
    folder = RunFolder(tmp_path)
    logger.warning("before")
    with folder:
        logger.warning("kl is %.1f", 2.5)
        logger.info("not a warning")
        folder.write_metrics(7, {})
        logger.error("half \ud800 a character")
        logging.getLogger("other").warning("not ours")
    logger.warning("after")
    first, second = lines(tmp_path / "events.jsonl")
    assert first.keys() == {"step", "time", "level", "source", "text"}
    assert (first["step"], first["level"], first["text"]) == (0, "WARNING", "kl is 2.5")
    assert first["source"] == "ppo_fast.runs.health"
    assert (second["step"], second["level"]) == (7, "ERROR")


def test_warnings_are_still_printed_where_nobody_set_up_logging(tmp_path):
    code = (
        "import logging, sys; from pathlib import Path\n"
        "from ppo_fast.run_folder.folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1], 'a')), RunFolder(Path(sys.argv[1], 'b')):\n"
        "    logging.getLogger('ppo_fast.x').warning('first')\n"
        "    logging.basicConfig(format='mine: %(message)s')\n"
        "    logging.getLogger('ppo_fast.x').warning('second')\n"
    )
    run = [sys.executable, "-c", code, str(tmp_path)]
    said = subprocess.run(run, capture_output=True, text=True, check=True)
    assert said.stderr == "first\nmine: second\n"
    assert len(lines(tmp_path / "b" / "events.jsonl")) == 2


# A disk that is full
