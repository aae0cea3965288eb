"""``ppo-fast watch``: the numbers of a run on the terminal, while it goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console


@dataclass(frozen=True)
class Watch:
    """Show the metrics, the last evaluation and a sample of a run, and follow it as it goes on.

    It reads the run's folder and changes nothing in it. Ctrl-C ends it. Where the output is not a
    terminal, it prints one picture, as with --once.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run (--output-dir of train); it may still be empty."""
    once: bool = False
    """Print one picture and end."""
    interval: float = 1.0
    """Seconds between two looks at the files."""

    def run(self, console: Console) -> None:
        """Run the command."""
        from ppo_fast.report.watch import watch

        if not 0.05 <= self.interval <= 3600:
            raise ValueError(f"--interval: got {self.interval:g}, expected seconds in [0.05, 3600]")
        watch(console, self.folder, once=self.once, interval=self.interval)
