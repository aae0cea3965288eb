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
    """Print the memory that several ways of training a policy take, from its config alone."""

    policy: str
    """The policy: a model directory or a hub name; only its config is read."""
    batch_size: int = 16
    """Prompts per step."""
    prompt_length: int = 128
    """Max tokens of a prompt."""
    memory: float | None = None
    """Available memory in GB; the table then says which plans fit."""
    lora_rank: int = 16
    """LoRA rank of the plans with LoRA, which are shown if peft is installed."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Device to plan for: on the CPU, a rollout also copies the weights that have LoRA adapters."""
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
