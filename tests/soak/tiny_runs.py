"""Tiny runs of ``ppo-fast train``, in forked processes, and what their folders must hold."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tiny_models import tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS

from ppo_fast.cli.main import main
from ppo_fast.ppo import PPO
from soak.file_faults import FileFaults
from soak.part import work_folder
from soak.worker import Report, Worker, import_all_of

# A reward that draws from every random generator: their states must come back too.
REWARD = """
import random
import numpy as np
import torch

def reward(prompts, completions):
    noise = random.random() + np.random.rand() + torch.rand(()).item()
    return [sum(map(ord, text)) % 97 / 50 + noise for text in completions]
"""
COMMON = {
    "policy": "model",
    "prompts": "prompts.txt",
    "reward": "noisy_reward.py:reward",
    "batch_size": 2,
    "max_length": 4,
    "learning_rate": 0.001,
    "device": "cpu",
}
# Runs that differ in what they train, write and keep.
VARIANTS: dict[str, dict[str, Any]] = {
    "head": {"critic": "head", "checkpoint_freq": 1, "num_epochs": 2},
    "samples": {"samples_per_prompt": 2, "checkpoint_freq": 1, "keep_last": 2, "num_epochs": 1},
    "value": {"value_model": "model", "checkpoint_freq": 2, "keep_last": 1, "num_epochs": 1},
    "adapter": {"lora_rank": 2, "critic": "head", "checkpoint_freq": 1, "held_out": 0.4},
}


@dataclass(frozen=True)
class TinyRun:
    """A run of a variant in its own folder.

    variant: name of VARIANTS.
    place: folder with models, prompts and the reward, which are only read.
    folder: of the run: an absolute path.
    output: file for what its processes print.
    more: settings beside those of the variant.
    """

    variant: str
    place: Path
    folder: Path
    output: Path
    more: dict[str, Any] = field(default_factory=dict)

    def argv(self, steps: int) -> list[str]:
        """Return the arguments of the command that runs or resumes it, until ``steps`` are done."""
        settings = COMMON | VARIANTS[self.variant] | self.more
        settings |= {"output_dir": self.folder, "num_steps": steps}
        flags = [(f"--{name.replace('_', '-')}", str(v)) for name, v in settings.items()]
        return ["train", *(part for flag in flags for part in flag), "--resume"]

    def start(
        self,
        steps: int,
        faults: FileFaults | None = None,
        before: Callable[[Report], None] | None = None,
    ) -> Worker:
        """Start it in a process of its own; its file operations follow the plan of ``faults``.

        ``before`` is called in the process first.
        """

        def task(report: Report) -> None:
            os.chdir(self.place)
            sys.argv = ["ppo-fast"]
            (before or report_saves)(report)
            if faults is not None:
                faults.watch(self.folder)
            main(self.argv(steps))

        return Worker(task, self.output)


def report_saves(report: Report) -> None:
    """Report each step once it is done, and each checkpoint once it is written, in this process."""
    save, step = PPO.save_checkpoint, PPO.step

    def saving(self: Any, checkpoint_dir: Any, number: int) -> Path:
        path = save(self, checkpoint_dir, number)
        report(f"saved {number}")
        return path

    def stepping(self: Any, *arguments: Any, **options: Any) -> Any:
        found = step(self, *arguments, **options)
        report(f"done {found.number}")
        return found

    PPO.save_checkpoint, PPO.step = saving, stepping  # type: ignore[method-assign]


@cache
def place() -> Path:
    """Make the folder with what runs read, once, and import what runs import.

    Models and tokenizer are made in a process of its own: they start threads.
    """
    folder = work_folder("place")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

    def make(report: Report) -> None:
        tiny_model(layers=1, hidden=32).save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
        (folder / "prompts.txt").write_text("\n".join(PROMPTS), "utf-8")
        (folder / "noisy_reward.py").write_text(REWARD, "utf-8")

    def run(report: Report) -> None:
        os.chdir(folder)
        main(TinyRun("adapter", folder, folder / "warm", folder / "output").argv(1))

    output = folder / "output"
    if (ended := Worker(make, output).wait()).status:
        raise RuntimeError(f"status {ended.status}: {output.read_text()}")
    import_all_of(run, output)
    return folder
