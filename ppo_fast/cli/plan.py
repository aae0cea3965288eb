"""``ppo-fast plan``: the memory that training takes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import tyro
from rich.console import Console

from ppo_fast.checks import check_counts
from ppo_fast.config import PPOConfig
from ppo_fast.models.pretrained import check_model, load_pretrained
from ppo_fast.rewards.load import function_of


@dataclass(frozen=True)
class Plan:
    """Print the memory that several ways of training a policy take, from its config alone.

    The largest sum at one time is the peak. A margin is added, for temporary tensors, gaps between
    blocks of memory and, on a GPU, the CUDA context, which are not computed. Without
    --compute-dtype, the sums with --compute-dtype bfloat16 are shown too.
    """

    policy: str
    """The policy: a model directory or a hub name; only its config is read."""
    batch_size: int = 16
    """Prompts per step."""
    prompt_length: int = 128
    """Max tokens of a prompt."""
    reward: str | None = None
    """The reward, as in train: the weights of a classifier are added; a function has none."""
    memory: float | None = None
    """Available memory in GB; the table then says which plans fit."""
    lora_rank: int = 16
    """LoRA rank of the plans with LoRA, which are shown if peft is installed."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Bits of the weights under LoRA adapters, in the plans with LoRA; None: as they are."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Device to plan for: on the CPU, a rollout also copies the weights that have LoRA adapters."""
    ppo: tyro.conf.OmitArgPrefixes[PPOConfig] = field(default_factory=PPOConfig)

    def run(self, console: Console) -> None:
        """Run the command."""
        from transformers import AutoConfig

        from ppo_fast.diagnostics.memory_plan import classifier_bytes, plans
        from ppo_fast.diagnostics.show_plans import show_plans

        check_model("policy", self.policy)
        names = ("batch_size", "prompt_length", "lora_rank")
        sizes: dict[str, Any] = {name: getattr(self, name) for name in names}
        check_counts(**sizes)
        sizes |= {"device": self.device, "quantization": self.quantization}
        if self.reward is not None and function_of(self.reward) is None:
            check_model("reward", self.reward)
            sizes["reward_bytes"] = classifier_bytes(
                load_pretrained("reward", AutoConfig, self.reward)
            )
        model_config = load_pretrained("policy", AutoConfig, self.policy)
        found, in_bfloat16 = plans(model_config, self.ppo, **sizes), None
        if self.ppo.compute_dtype is None:
            bfloat16 = replace(self.ppo, compute_dtype="bfloat16")
            in_bfloat16 = plans(model_config, bfloat16, **sizes)
        show_plans(console, found, self.memory, in_bfloat16)
