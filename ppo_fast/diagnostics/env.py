"""``ppo-fast env``: versions, the device, and which implementation each op gets."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ppo_fast.models.pretrained import load_pretrained
from ppo_fast.ops.backends import first_use
from ppo_fast.ops.backends.cpus import usable_cpus
from ppo_fast.ops.backends.dispatch import choose
from ppo_fast.ops.backends.impls import COMPILED, missing
from ppo_fast.runs.plain_text import plain

PACKAGES = ("ppo_fast", "torch", "transformers", "triton", "numpy", "tokenizers", "peft")


def print_environment(console: Console, policy: str | None = None) -> None:
    """Print what a bug report needs. On a GPU, check kernels that were not used on it yet.

    Args:
        policy: a model directory or name; the fast paths that it can take are then checked too.
    """
    from ppo_fast.models.transformers_internals import why_no_add_adapter

    device = main_device()
    choices: dict[str, tuple[str, str]] = {}
    with console.status("checking kernels that were not used on this machine yet"):
        for op in COMPILED:
            try:
                choices[op] = choose(op, "auto", device)
            except (ValueError, RuntimeError) as error:  # PPO_FAST_IMPL asks for what is not there
                choices[op] = ("none", str(error))
        triton_kernels = _triton_kernels(device)
    table = Table("what", "found", title="ppo_fast environment")
    for what, found in (facts(device) | {"Triton kernels": triton_kernels}).items():
        table.add_row(what, plain(found))
    console.print(table)
    ops = Table("op", "implementation", "why", title=f"ops on {device.type}")
    for op, choice in choices.items():
        ops.add_row(op, *map(plain, choice))
    console.print(ops)
    if reason := why_no_add_adapter():
        console.print(plain(f"adapters: {reason}"))
    if policy is not None:
        console.print(_fast_paths(policy, device))


def main_device() -> torch.device:
    """Return the device that this machine computes on: cuda where there is one, else cpu."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def facts(device: torch.device) -> dict[str, str]:
    """Return versions and hardware, by name."""
    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{package: _version(package) for package in PACKAGES},
        "torch": torch.__version__,  # with its build (+cu130), which its metadata may leave out
        "device": _describe(device),
        "threads": _threads(),
        "PPO_FAST_IMPL": os.environ.get("PPO_FAST_IMPL", "(not set)"),
        "C++ kernels": _cpp_kernels(),
    }


def _threads() -> str:
    ours = min(torch.get_num_threads(), usable_cpus())
    found = f"{torch.get_num_threads()} of torch, {ours} of the C++ kernels"
    if torch.backends.openmp.is_available():
        return found
    return f"{found}; this torch is built without OpenMP, and may compute with one thread"


def _cpp_kernels() -> str:
    """Return which C++ kernels run; or why there are none, and what to do."""
    reason = missing("cpp")
    if reason is None:
        return f"built, running {_instruction_set()}"
    if importlib.util.find_spec("ppo_fast.ops._C") is not None:
        return reason  # built, but it cannot be imported
    tools = " and ".join(_missing_tools())
    why = f"{tools} missing here; install that, then" if tools else "what builds them is here now;"
    return (
        f"not built when ppo_fast was installed: {why} `pip install --force-reinstall --no-deps "
        "--no-cache-dir ppo_fast` (in a checkout `.`). Until then the ops run in plain PyTorch"
    )


def _missing_tools() -> Iterator[str]:
    """Yield what the C++ kernels need to be built, and is not on this machine."""
    if not any(map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++", "cl"))):
        yield "a C++ compiler (Debian: g++; macOS: xcode-select --install)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        yield "Python's headers (Debian: python3-dev)"


def _triton_kernels(device: torch.device) -> str:
    if reason := missing("triton"):
        return reason
    if device.type != "cuda":
        return "can be imported; there is no GPU to run them on"
    results = {
        op: first_use.first_use(op, device) for op, impls in COMPILED.items() if "triton" in impls
    }
    wrong = [op for op, result in results.items() if not result.ok]
    right = f"{len(results) - len(wrong)} ops right"
    return f"checked on this GPU: {', '.join([right, *(f'{op} wrong' for op in wrong)])}"


def _fast_paths(policy: str, device: torch.device) -> Table:
    from transformers import AutoModelForCausalLM

    from ppo_fast.models.language_model import LanguageModel
    from ppo_fast.rollout.speedups.fast_paths import fast_paths

    raw = load_pretrained("policy", AutoModelForCausalLM, policy, dtype=torch.float32).to(device)
    try:
        model, no_trunk = LanguageModel(raw, num_layers_unfrozen=1), None
    except ValueError as error:
        model, no_trunk = LanguageModel(raw), str(error)
    table = Table(
        "fast path", "can be taken", "why not", "cost of not taking it", title=plain(policy)
    )
    for path in fast_paths(model):
        why_not = no_trunk if path.name == "frozen trunk" else path.why_not
        cost = "" if path.in_force else path.cost
        row = path.name, "yes" if path.in_force else "no", why_not or "", cost
        table.add_row(*map(plain, row))
    return table


def _instruction_set() -> str:
    from ppo_fast.ops import _C

    return f"{_C.instruction_set()} of {', '.join(_C.instruction_sets())}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    gpu = torch.cuda.get_device_properties(device)
    return (
        f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
        f"{gpu.multi_processor_count} multiprocessors, {gpu.total_memory / 2**30:.1f} GiB, "
        f"driver {first_use.driver()}, CUDA {torch.version.cuda}"
    )
