"""``ppo-fast train``: PPO on a file of prompts."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console

from ppo_fast.checks import check_counts
from ppo_fast.config import PPOConfig
from ppo_fast.data.prompts import read_prompts
from ppo_fast.models.pretrained import check_model, load_pretrained
from ppo_fast.rewards.load import function_of
from ppo_fast.runs.plain_text import plain

if TYPE_CHECKING:
    import torch

    from ppo_fast.ppo import PPO
    from ppo_fast.runs.folder import RunFolder


@dataclass(frozen=True)
class Train:
    """Train a policy on a file of prompts. Every field of PPOConfig is a flag."""

    policy: str = ""
    """The policy: a model directory or a hub name. Required."""
    prompts: Path = Path()
    """Prompts: .txt (one per line), .jsonl or .csv (their "prompt" field). Required."""
    reward: str = ""
    """module:function or file.py:function, f(prompts, completions) -> list[float], or the
    directory or hub name of a sequence classifier. Required."""
    reward_label: str | None = None
    """Name or index of the classifier's label whose log-odds are the score; None: the classifier
    has one label, whose logit is the score."""
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
        prompts = _prompts(self.prompts)

        from ppo_fast.rewards.load import load_reward
        from ppo_fast.runs.folder import RunFolder

        device = self._device()
        reward = load_reward(self.reward, device, self.reward_label)
        with RunFolder(self.output_dir) as folder:
            self._train(console, folder, prompts, reward, device)

    def _train(
        self,
        console: Console,
        folder: RunFolder,
        prompts: list[str],
        reward: Any,
        device: torch.device,
    ) -> None:
        from ppo_fast.runs.display import StepDisplay
        from ppo_fast.runs.folder import newest_checkpoint, save_policy
        from ppo_fast.runs.trackers import step_logger

        checkpoints = self.output_dir / "checkpoints"
        newest = newest_checkpoint(checkpoints)
        if newest is not None and not self.resume:
            raise ValueError(
                f"--output-dir: {self.output_dir} holds a run ({newest.name}); continue it with "
                "--resume, or name another folder"
            )
        ppo = self._make_ppo(reward, device)
        if newest is not None:
            console.print(plain(f"resumed {newest} after step {ppo.load_checkpoint(newest)}"))
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
        console.print(plain(f"trained policy: {self.output_dir / 'policy'}"), soft_wrap=True)

    def _check(self) -> None:
        for name in ("policy", "prompts", "reward"):
            if getattr(self, name) in ("", Path()):
                raise ValueError(f"--{name}: is required")
        check_model("policy", self.policy)
        if self.value_model is not None:
            check_model("value-model", self.value_model)
        if function_of(self.reward) is None:
            check_model("reward", self.reward)
        check_counts(lora_rank=1 if self.lora_rank is None else self.lora_rank)

    def _device(self) -> torch.device:
        from torch import nn

        from ppo_fast.models.checks import resolve_device

        return resolve_device(self.device, nn.Module())

    def _make_ppo(self, reward: Any, device: torch.device) -> PPO:
        """Make PPO, with models from their folders or the hub."""
        import torch
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, set_seed

        from ppo_fast.models.heads import ValueModel
        from ppo_fast.models.lora import with_lora
        from ppo_fast.ppo import PPO

        set_seed(self.ppo.seed)  # new adapters and value heads are drawn from it
        tokenizer = load_pretrained("policy", AutoTokenizer, self.policy)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        dtype = torch.float32 if self.ppo.compute_dtype is None else "auto"
        policy = load_pretrained("policy", AutoModelForCausalLM, self.policy, dtype=dtype)
        if self.lora_rank is not None:
            policy = with_lora(policy, self.lora_rank, self.ppo.num_layers_unfrozen)
        value_model = None
        if self.value_model is not None:
            # AutoModel: without the LM head
            base = load_pretrained("value-model", AutoModel, self.value_model, dtype=torch.float32)
            value_model = ValueModel(base, base.config.get_text_config().hidden_size)
        return PPO(
            policy, tokenizer, reward, value_model=value_model, device=device, config=self.ppo
        )


def _prompts(path: Path) -> list[str]:
    """Read the prompts, however long they are; csv's own limit is 131,072 characters."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        return read_prompts(path)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts: {path} cannot be read ({error})") from error
    finally:
        csv.field_size_limit(before)
