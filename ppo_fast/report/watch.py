"""Follow a run on the terminal."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from ppo_fast.report.terminal import Picture
from ppo_fast.report.watched import Watched


def watch(console: Console, folder: Path, *, once: bool = False, interval: float = 1.0) -> None:
    """Show a run, and on a terminal follow it until Ctrl-C, which ends with status 130.

    Args:
        folder: of the run; it may have no files yet.
        once: print one picture and return; so does an output that is no terminal.
        interval: seconds between two looks at the files.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is a file.
    """
    if not folder.exists():
        raise FileNotFoundError(f"RUN: no folder {folder}")
    if not folder.is_dir():
        raise ValueError(f"RUN: {folder} is a file; name the folder that it is in")
    run = Watched(folder)
    run.update()
    if once or not console.is_terminal:
        console.print(Picture(run))
        return
    try:
        with Live(Picture(run), console=console, auto_refresh=False, transient=True) as live:
            while True:
                live.refresh()
                time.sleep(interval)
                run.update()
    except KeyboardInterrupt:
        console.print(Picture(run))
        raise SystemExit(130) from None
