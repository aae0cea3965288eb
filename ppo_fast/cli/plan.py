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

    policy: str | None = None
    """The policy: a model directory or a hub name; only its config is read."""
    sizes: bool = False
    """Instead of --policy: print what fits on GPUs of 12, 24, 48 and 80 GB, of models of 0.5B to 8B
    trained by QLoRA, LoRA, top layers or whole, with and without offload; in bfloat16."""
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

        names = ("batch_size", "prompt_length", "lora_rank")
        sizes: dict[str, Any] = {name: getattr(self, name) for name in names}
        check_counts(**sizes)
        if self.sizes:
            self._show_what_fits(console, sizes)
            return
        if self.policy is None:
            raise ValueError("--policy: is required, but with --sizes")
        check_model("policy", self.policy)
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

    def _show_what_fits(self, console: Console, sizes: dict[str, Any]) -> None:
        from ppo_fast.diagnostics.what_fits import show_what_fits, what_fits

        if self.policy is not None:
            raise ValueError(f"--sizes: plans models of usual sizes, not --policy {self.policy}")
        config = replace(self.ppo, compute_dtype="bfloat16")
        show_what_fits(console, what_fits(config, **sizes))
