"""What this installation runs on: versions, device, and which implementation each op gets."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from ppo_fast.ops.dispatch import COMPILED, choose, missing

PACKAGES = ("ppo_fast", "torch", "transformers", "triton", "numpy", "tokenizers")


def print_environment(console: Console, policy: str | None = None) -> None:
    """Print the report that a bug report should hold.

    Args:
        policy: a model directory or name; its LM head is then checked too.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = Table("what", "found", title="ppo_fast environment")
    facts.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        facts.add_row(package, _version(package))
    facts.add_row("device", _describe(device))
    facts.add_row("threads", str(torch.get_num_threads()))
    facts.add_row("PPO_FAST_IMPL", os.environ.get("PPO_FAST_IMPL", "(not set)"))
    facts.add_row("C++ kernels", missing("cpp") or f"built, running {_instruction_set()}")
    facts.add_row("Triton kernels", missing("triton") or "triton can be imported")
    console.print(facts)
    ops = Table("op", "implementation", "why", title=f"ops on {device.type}")
    for op in COMPILED:
        try:
            ops.add_row(op, *choose(op, "auto", device))
        except (ValueError, RuntimeError) as error:  # PPO_FAST_IMPL asks for what is not there
            ops.add_row(op, "none", str(error))
    console.print(ops)
    if policy is not None:
        console.print(f"LM head of {policy}: {_head_path(policy)}")


def _head_path(policy: str) -> str:
    from transformers import AutoModelForCausalLM

    from ppo_fast.language_model import LanguageModel

    model = LanguageModel(AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32))
    return f"{'fused' if model.fused else 'ordinary'} path ({model.reason})"


def _instruction_set() -> str:
    from ppo_fast import _C

    return f"{_C.instruction_set()} of {', '.join(_C.instruction_sets())}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}"
