"""Peak memory of one side, in a process of its own.

It is the high-water mark that Linux keeps, reset once the inputs or the models are there: that of
getrusage would start at what the parent process had needed. For an operation, imports, inputs and
returned gradients do not count; for whole steps everything does.
"""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import heads
from torch import Tensor

MEGABYTE, GIGABYTE = 1e6, 1e9


def peak_megabytes(module: str, name: str, entropy: bool, frozen: bool = False) -> float:
    """Return the peak megabytes of HEADS[name] of ``module``, forward and backward."""
    return in_own_process("report", module, name, entropy, frozen) / MEGABYTE


def step_gigabytes(module: str, work: str, name: str) -> float:
    """Return the peak gigabytes of a process with two steps of SIDES[work][name] of ``module``."""
    return in_own_process("report_steps", module, work, name) / GIGABYTE


def in_own_process(function: str, *arguments: Any) -> float:
    """Return the bytes that a function of this module prints in a new process."""
    code = f"import sys; sys.path[:] = {sys.path!r}; import memory; "
    code += f"memory.{function}(*{arguments!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{function}{arguments}: {done.stderr}")
    return float(done.stdout.split()[-1])


def report(module: str, name: str, entropy: bool, frozen: bool) -> None:
    form = importlib.import_module(module).HEADS[name]
    run(form, entropy, heads.make_work(tokens=8, vocab=64, hidden=16, frozen=frozen))  # loads code
    work = heads.make_work(frozen=frozen)
    before = start()
    returned = run(form, entropy, work)
    print(resident("VmHWM") - before - sum(grad.nbytes for grad in returned))


def run(form: Callable, entropy: bool, work: heads.Work) -> tuple[Tensor, ...]:
    return heads.gradients(form(work, entropy), work)


def report_steps(module: str, work: str, name: str) -> None:
    from ppo_fast.demo.smollm2 import load_smollm2

    step = importlib.import_module(module).SIDES[work][name](load_smollm2())
    gc.collect()  # a side's models are copies
    start()
    for _ in range(2):
        step()
    print(resident("VmHWM"))


def start() -> int:
    """Reset the high-water mark to the bytes in use, and return these."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    return before


def resident(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
