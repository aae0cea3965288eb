"""``ppo-fast plan``: the memory that training takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import tyro
from rich.console import Console

from ppo_fast.checks import check_counts
from ppo_fast.cli.train import check_folder
from ppo_fast.config import PPOConfig


@dataclass(frozen=True)
class Plan:
    """Print the memory that training a policy takes, from its config alone, in several ways."""

    policy: str
    """The policy: a model directory or a hub name; only its config is read."""
    batch_size: int = 16
    prompt_length: int = 128
    """Tokens of the longest prompt."""
    memory: float | None = None
    """Available memory in GB; the table then says which ways fit."""
    lora_rank: int = 16
    """Rank of the ways with LoRA, which are shown where peft is installed."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cuda or cpu; on the CPU, a rollout copies weights that have adapters."""
    ppo: tyro.conf.OmitArgPrefixes[PPOConfig] = field(default_factory=PPOConfig)

    def run(self, console: Console) -> None:
        """Run the command."""
        from transformers import AutoConfig

        from ppo_fast.diagnostics.memory_plan import plans, show_plans

        check_folder("policy", self.policy)
        names = ("batch_size", "prompt_length", "lora_rank")
        sizes = {name: getattr(self, name) for name in names}
        check_counts(**sizes)
        model_config = AutoConfig.from_pretrained(self.policy)
        show_plans(console, plans(model_config, self.ppo, **sizes, device=self.device), self.memory)
