"""``ppo-fast train``: PPO on a file of prompts."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console

from ppo_fast.checks import check_counts
from ppo_fast.config import PPOConfig
from ppo_fast.data.prompts import read_prompts

if TYPE_CHECKING:
    from ppo_fast.ppo import PPO


@dataclass(frozen=True)
class Train:
    """Train a policy on a file of prompts. Every field of PPOConfig is a flag."""

    policy: str = ""
    """The policy: a model directory or a hub name. Required."""
    prompts: Path = Path()
    """Prompts: .txt (one per line), .jsonl or .csv (their "prompt" field). Required."""
    reward: str = ""
    """module:function, f(prompts, completions) -> list[float], or the directory or name of a
    sequence classifier with one label. Required."""
    value_model: str | None = None
    """A causal LM whose body becomes the value model; None: see critic."""
    lora_rank: int | None = None
    """Train LoRA adapters of this rank on all layers, or on those of num_layers_unfrozen, with
    alpha twice the rank; None: train the weights themselves."""
    output_dir: Path = Path("runs/train")
    """Folder for metrics.jsonl, samples.jsonl, config.yaml, checkpoints/ and the final policy/."""
    num_steps: int = 100
    """Steps of the whole run, including those before a resume."""
    batch_size: int = 16
    """Prompts per step."""
    checkpoint_freq: int = 10
    """Steps between checkpoints."""
    resume: bool = False
    """Continue from the newest checkpoint in output_dir."""
    device: str = "auto"
    """Device to train on; auto: cuda if there is a GPU, else cpu."""
    config: Path | None = None
    """A YAML file of any of these flags (names with underscores); a flag overrides the file."""
    ppo: tyro.conf.OmitArgPrefixes[PPOConfig] = field(default_factory=PPOConfig)

    def run(self, console: Console) -> None:
        """Run the command."""
        self._check()
        prompts = read_prompts(self.prompts)

        from ppo_fast.rewards.load import load_reward
        from ppo_fast.runs.display import StepDisplay
        from ppo_fast.runs.folder import RunFolder, newest_checkpoint, save_policy
        from ppo_fast.runs.trackers import step_logger

        device = self._device()
        reward = load_reward(self.reward, device)
        checkpoints = self.output_dir / "checkpoints"
        newest = newest_checkpoint(checkpoints)
        if newest is not None and not self.resume:
            raise ValueError(
                f"--output-dir: {self.output_dir} holds a run ({newest.name}); continue it with "
                "--resume, or name another folder"
            )
        ppo = self._make_ppo(reward, device)
        folder = RunFolder(self.output_dir)
        if newest is not None:
            console.print(f"resumed {newest} after step {ppo.load_checkpoint(newest)}")
        done = ppo.progress.steps
        if self.num_steps <= done:
            raise ValueError(
                f"--num-steps: got {self.num_steps}, expected more than the {done} done"
            )
        # settings of a --config file are among these fields
        settings = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("ppo", "config")
        }
        folder.write_config(ppo.config, **settings)
        folder.forget_after(done)
        with StepDisplay(console, self.num_steps - done) as display:
            ppo.train(
                prompts,
                self.num_steps - done,
                self.batch_size,
                checkpoint_dir=checkpoints,
                checkpoint_freq=self.checkpoint_freq,
                progress=False,
                on_step=step_logger(folder, display),
            )
        ppo.save_checkpoint(checkpoints, ppo.progress.steps)
        save_policy(ppo.policy.model, ppo.tokenizer, self.output_dir / "policy")
        console.print(f"trained policy: {self.output_dir / 'policy'}")

    def _check(self) -> None:
        for name in ("policy", "prompts", "reward"):
            if getattr(self, name) in ("", Path()):
                raise ValueError(f"--{name}: is required")
        for name in ("policy", "value_model", "reward"):
            check_folder(name, getattr(self, name))
        check_counts(lora_rank=1 if self.lora_rank is None else self.lora_rank)

    def _device(self) -> str:
        import torch

        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def _make_ppo(self, reward: Any, device: str) -> PPO:
        """Make PPO, with models from their folders or the hub."""
        import torch
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, set_seed

        from ppo_fast.models.heads import ValueModel
        from ppo_fast.models.lora import with_lora
        from ppo_fast.ppo import PPO

        set_seed(self.ppo.seed)  # new adapters and value heads are drawn from it
        tokenizer = AutoTokenizer.from_pretrained(self.policy)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        dtype = torch.float32 if self.ppo.compute_dtype is None else "auto"
        policy = AutoModelForCausalLM.from_pretrained(self.policy, dtype=dtype)
        if self.lora_rank is not None:
            policy = with_lora(policy, self.lora_rank, self.ppo.num_layers_unfrozen)
        value_model = None
        if self.value_model is not None:
            base = AutoModel.from_pretrained(self.value_model, dtype=torch.float32)  # no LM head
            value_model = ValueModel(base, base.config.get_text_config().hidden_size)
        return PPO(
            policy, tokenizer, reward, value_model=value_model, device=device, config=self.ppo
        )


def check_folder(flag: str, model: str | None) -> None:
    """Raise FileNotFoundError for a path without a folder.

    transformers would ask the hub for it.
    """
    path = Path(model or "")
    is_path = path.is_absolute() or len(path.parts) > 2 or (model or "").startswith(".")
    if model and ":" not in model and is_path and not path.is_dir():
        raise FileNotFoundError(f"--{flag.replace('_', '-')}: no folder {model}")
