"""``ppo-fast doctor``: every kernel checked on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console


@dataclass(frozen=True)
class Doctor:
    """Check every kernel on this machine, and on a GPU time it. Exit status 1 if one is wrong."""

    json: Path | None = None
    """File to write the findings to, for a bug report; None: print them."""
    interpret: bool = False
    """Check the values of the Triton kernels in Triton's interpreter, on the CPU (a minute)."""

    def run(self, console: Console) -> None:
        """Run the command."""
        from ppo_fast.diagnostics.doctor import run_doctor

        if not run_doctor(console, self.json, interpret=self.interpret):
            raise SystemExit(1)
