"""``ppo-fast env``: versions, the device, and which implementation each op gets."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from ppo_fast.models.pretrained import check_model


@dataclass(frozen=True)
class Env:
    """Print versions, the device, and which implementation each op gets and why."""

    policy: str | None = None
    """A model directory or hub name; also print which fast paths this model takes."""

    def run(self, console: Console) -> None:
        """Run the command."""
        if self.policy is not None:
            check_model("policy", self.policy)

        from ppo_fast.diagnostics.env import print_environment

        print_environment(console, self.policy)
