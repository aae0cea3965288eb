"""``ppo-fast demo``: a real model learns on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console


@dataclass(frozen=True)
class Demo:
    """Train SmolLM2-135M to continue reviews positively, on this machine, in some minutes."""

    output_dir: Path = Path("runs/demo")
    """Folder for the metrics, samples, plot and the trained policy."""
    num_steps: int | None = None
    """Steps of PPO; None: the demo's default."""
    seed: int = 0
    """Seed of the run."""

    def run(self, console: Console) -> None:
        """Run the command."""
        from ppo_fast.demo.run import run_demo

        run_demo(console, self.output_dir, num_steps=self.num_steps, seed=self.seed)
