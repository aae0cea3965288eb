"""Peak memory of one side, in a process of its own.

Imports, inputs and gradients that are returned do not count: the figure is what a side needs beyond
them. The kernel's own high-water mark (Linux), which is set back once the inputs are there:
getrusage's would start at what the parent process had needed.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import heads
import torch

MEGABYTE = 1e6


def peak_megabytes(module: str, name: str, entropy: bool) -> float:
    """What HEADS[name] of ``module`` needs, forward and backward."""
    folder = Path(sys.modules[module].__file__ or "").parent
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(folder)]!r}; import memory; "
    )
    code += f"memory.report({module!r}, {name!r}, {entropy!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name}: {done.stderr}")
    return float(done.stdout.split()[-1])


def report(module: str, name: str, entropy: bool) -> None:
    form = importlib.import_module(module).HEADS[name]
    run(form, entropy, heads.make_work(tokens=8, vocab=64, hidden=16))  # loads the code
    work = heads.make_work()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is in use
    returned = run(form, entropy, work)
    peak = resident("VmHWM") - before - sum(grad.nbytes for grad in returned)
    print(peak / MEGABYTE)


def run(form: Callable, entropy: bool, work: heads.Work) -> tuple[torch.Tensor, ...]:
    return heads.gradients(form(work, entropy), work)


def resident(field: str) -> int:
    """Bytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
