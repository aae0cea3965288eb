"""The sides of whole PPO steps by name, ours and TRL's, and what a process of each needs."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory import resident
from step_sides import Ours
from trl_side import Theirs

from ppo_fast import ValueModel
from ppo_fast.demo_task import load_prompts
from ppo_fast.smollm2 import load_smollm2

HERE = Path(__file__).parent
NEW, EPOCHS = 48, 4
OPTIONS = {"learning_rate": 1e-5, "max_length": NEW, "num_epochs": EPOCHS}


def with_value_model(smollm2: Any, prompts: list[str]) -> Ours:
    return Ours(smollm2, prompts, ValueModel(copy.deepcopy(smollm2[0]), 576), **OPTIONS)


def with_head(smollm2: Any, prompts: list[str]) -> Ours:
    return Ours(smollm2, prompts, critic="head", **OPTIONS)


def with_top(smollm2: Any, prompts: list[str]) -> Ours:
    return Ours(smollm2, prompts, critic="head", num_layers_unfrozen=4, **OPTIONS)


def by_trl(smollm2: Any, prompts: list[str]) -> Theirs:
    return Theirs(smollm2, prompts, NEW, EPOCHS)


# TRL has the first mode alone; the last one is another training, and not only another layout.
SIDES: dict[str, Callable[[Any, list[str]], Ours | Theirs]] = {
    "ppo_fast, a value model of its own, all weights": with_value_model,
    "ppo_fast, a value head, all weights: no such mode in TRL": with_head,
    "ppo_fast, a value head, 4 layers: not the same training": with_top,
    "TRL's PPOTrainer, a value model of its own, all weights": by_trl,
}


def make_side(name: str, smollm2: Any) -> Ours | Theirs:
    return SIDES[name](smollm2, load_prompts()[0][:4])


def peak_gigabytes(name: str) -> float:
    """The most memory that a process of its own has in use during two steps, with all it holds."""
    paths = [str(HERE), str(HERE.parents[1])]
    code = f"import sys; sys.path[:0] = {paths!r}; import whole_steps; whole_steps.report({name!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name}: {done.stderr}")
    return float(done.stdout.split()[-1])


def report(name: str) -> None:
    side = make_side(name, load_smollm2())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # loading is no side's: it does not count
    for _ in range(2):
        side.step()
    print(resident("VmHWM") / 1e9)
