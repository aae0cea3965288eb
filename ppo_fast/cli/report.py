"""``ppo-fast report``: a page of HTML about one or several runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ppo_fast.runs.plain_text import plain


@dataclass(frozen=True)
class Report:
    """Write one page of HTML about one or several runs: curves, evaluations, samples, settings.

    The page is one file that loads nothing: it opens without a network. It is made from the run's
    folder alone, while the run goes on or after it.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Folders of runs (--output-dir of train), at most 12."""
    output: Path | None = None
    """File to write; None: report.html in the run's folder, or, of several runs, in the current
    folder."""

    def run(self, console: Console) -> None:
        """Run the command."""
        from ppo_fast.report.page import write_page
        from ppo_fast.report.read import read_runs

        found = read_runs(self.runs)
        folder = self.runs[0] if len(self.runs) == 1 else Path()
        path = folder / "report.html" if self.output is None else self.output
        if path.is_dir():
            raise ValueError(f"--output: {path} is a folder; name a file, such as report.html")
        write_page(path, found)
        console.print(plain(path), soft_wrap=True)
