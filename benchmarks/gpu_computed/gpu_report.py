"""Compute the least times of the Triton kernels from their compiled code, without a GPU.

    python benchmarks/gpu_computed/gpu_report.py

compiles every kernel for every architecture as its launcher would, for the sizes of WORKS, prints
what the code needs and the least time that it can take, and writes results/gpu_computed.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parents[2] / "tests" / "helpers"))

import gpu_steps
import gpu_updates
import torch
import triton
from gpu_works import WORKS, Work, nbytes
from rich.console import Console
from rich.table import Table
from sass import Counts, Executed, executed
from stub_gpu import ARCHITECTURES, Code, Launched, stub_gpu
from torch import Tensor

RESULT = Path(__file__).parents[1] / "results" / "gpu_computed.json"
HEADER = "Computed, not measured"
CAVEAT = (
    "Least times: the longest of what bandwidth, instruction issue and the special function units "
    "take at the data sheets' peaks, launch after launch, and products at the tensor cores' peak. "
    "Latencies, other units and launches (some 5 us each) are left out: a measured time is longer, "
    "unless the L2 cache already holds what is read."
)

# A multiprocessor (SM), on every architecture here: schedulers, each of which issues an instruction
# of a warp a clock, and results of the special function units a clock (throughputs in the CUDA C++
# programming guide).
SCHEDULERS, SPECIAL_A_CLOCK, WARP = 4, 16, 32


class Gpu(NamedTuple):
    arch: int
    sms: int
    ghz: float
    """Boost clock."""
    bandwidth: int
    """GB/s."""
    tflops: int
    """Dense bf16 products, summed in float32."""


# NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM, L4, GeForce RTX 4090 (Ada whitepaper).
GPUS = {
    "A100": Gpu(80, 108, 1.41, 2039, 312),
    "H100": Gpu(90, 132, 1.98, 3350, 989),
    "H200": Gpu(90, 132, 1.98, 4800, 989),
    "L4": Gpu(89, 58, 2.04, 300, 121),
    "4090": Gpu(89, 128, 2.52, 1008, 165),
}


class Step(NamedTuple):
    """A launch, and what it moves and executes."""

    code: Code
    executed: Executed
    programs: int
    block: int
    """Elements that a program takes at once."""
    elements: int
    """Elements of its largest tensor."""
    bytes: float

    @property
    def turns(self) -> int:
        """Number of turns of the loop over a program's elements."""
        return max(1, triton.cdiv(self.elements // self.programs, self.block))

    @property
    def inner(self) -> Counts:
        """Counts of a thread for a block of elements: a turn of the loop, or the whole program."""
        return max(self.executed.loops, default=self.executed.program)

    def figures(self) -> dict[str, Any]:
        """Return the figures of the code; counts are per element."""
        of_a_thread = self.block / (self.code.num_warps * WARP)
        return {
            "registers": self.code.registers,
            "stack": self.code.stack,
            "shared": self.code.shared,
            "occupancy": _rounded(self.code.occupancy),
            "bytes": _rounded(self.bytes / self.elements),
            "instructions": _rounded(self.inner.instructions / of_a_thread),
            "special": _rounded(self.inner.special / of_a_thread),
            "wide": self.inner.wide,
        }

    def bounds(self, gpu: Gpu) -> dict[str, float]:
        """Return the least milliseconds of the launch by each bound."""
        all_turns = self.executed.in_all(self.turns)
        programs = triton.cdiv(self.programs, gpu.sms)  # of the busiest multiprocessor
        warps = programs * self.code.num_warps
        clocks_per_ms = gpu.ghz * 1e6 * min(SCHEDULERS, warps) / SCHEDULERS
        return {
            "bandwidth": self.bytes / gpu.bandwidth / 1e6,
            "issue": warps * all_turns.instructions / SCHEDULERS / clocks_per_ms,
            "special": warps * all_turns.special * WARP / SPECIAL_A_CLOCK / clocks_per_ms,
        }


def steps_of(work: Work, arch: int) -> tuple[list[Step], int]:
    """Return the launches of a work, and the bytes that any launches would have to move.

    These are the tensors that its launchers are given and return, each once.
    """
    steps, floor = [], 0
    for launcher, arguments in work.calls():
        with stub_gpu(arch) as launched:
            returned = launcher(*arguments)
        steps += [_step(record) for record in launched]
        floor += nbytes([*arguments, *(returned if isinstance(returned, tuple) else [returned])])
    return steps, floor


def _step(record: Launched) -> Step:
    code, programs = record.code, record.grid[0]
    block = record.how.block * record.arguments.get("HEAD_SIZE", 1)  # of attention: columns, chunks
    given, found = record.arguments.values(), _executed(code)
    elements = max(x.numel() for x in given if isinstance(x, Tensor))
    wide = sum(loop.wide for loop in found.loops or [found.program])
    # A tensor that is read twice, or changed in place, moves more than its bytes.
    moved = max(nbytes(given), elements / block * wide * 16 * code.num_warps * WARP)
    return Step(code, found, programs, block, elements, moved)


@cache
def _executed(code: Code) -> Executed:
    return executed(code.sass)


def kernels(works: dict[str, dict[int, list[Step]]]) -> list[dict[str, Any]]:
    """Return a line for each kernel, in order of first use, with its figures by architecture."""
    lines: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for name, by_arch in works.items():
        for arch, steps in by_arch.items():
            for step in steps:
                line = lines.setdefault((step.code.name, WORKS[name].dtype), {})
                if str(arch) not in line:
                    line[str(arch)] = step.figures()
    return [
        {"kernel": kernel, "dtype": dtype, "arch": by_arch}
        for (kernel, dtype), by_arch in lines.items()
    ]


def times(work: Work, steps: list[Step], gpu: Gpu) -> dict[str, Any]:
    """Return each bound in milliseconds, the least time in all, and the bound of most of it.

    The least time is that of the launches one after another.
    """
    each = [step.bounds(gpu) for step in steps]
    bounds = {name: sum(step[name] for step in each) for name in each[0]}
    rules = dict.fromkeys(bounds, 0.0)
    for step in each:
        ruling = max(step, key=lambda name: step[name])
        rules[ruling] += step[ruling]
    if work.flops:
        bounds["products"] = rules["products"] = work.flops / gpu.tflops / 1e9
    ruling = max(rules, key=lambda name: rules[name])
    bounds["least"] = sum(rules.values())
    return {name: _rounded(ms) for name, ms in bounds.items()} | {"bound": ruling}


def compute(progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Compute the report, as in results/gpu_computed.json."""
    works, lines = {}, []
    for name, work in WORKS.items():
        progress(name)
        found = {arch: steps_of(work, arch) for arch in ARCHITECTURES}
        works[name] = {arch: steps for arch, (steps, _) in found.items()}
        steps, floor = found[90]
        line = {
            "work": name,
            "bytes": _rounded(sum(step.bytes for step in steps) / work.elements),
            "floor": _rounded(floor / work.elements),
            "gpus": {g: times(work, works[name][gpu.arch], gpu) for g, gpu in GPUS.items()},
            "published": work.published,
        }
        lines.append(line)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    gpus = {name: gpu._asdict() for name, gpu in GPUS.items()}
    about = {"versions": versions, "caveat": CAVEAT, "gpus": gpus}
    decoding = gpu_steps.as_lines({name: gpu.bandwidth for name, gpu in GPUS.items()})
    progress("updates")
    updates = gpu_updates.as_lines()
    found = {"kernels": kernels(works), "works": lines, "decoding": decoding, "updates": updates}
    return about | found


def _rounded(x: float) -> float:
    """Round to 4 digits, for a file under version control."""
    return float(f"{x:.4g}")


def show(report: dict[str, Any], console: Console) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    console.print(f"[bold]{HEADER}[/] ({versions})\n{report['caveat']}")
    console.print(kernel_table(report["kernels"]))
    console.print(work_table(report["works"]))
    console.print(decoding_table(report["decoding"]))
    console.print(updates_table(report["updates"]))


def kernel_table(lines: list[dict[str, Any]]) -> Table:
    table = Table("kernel", "dtype", "sm", title=f"Kernels, as compiled ({HEADER.lower()})")
    titles = ("registers", "stack", "shared, B", "occupancy", "B an element")
    for title in (*titles, "instructions an element", "special", "128-bit accesses"):
        table.add_column(title, justify="right")
    for line in lines:
        label = line["kernel"], line["dtype"]
        for arch, it in line["arch"].items():
            occupancy = f"{it['occupancy']:.0%}"
            shown = {name: f"{amount:.4g}" for name, amount in it.items()} | {
                "occupancy": occupancy
            }
            table.add_row(*label, arch, *shown.values())
            label = "", ""
        table.add_section()
    return table


def work_table(lines: list[dict[str, Any]]) -> Table:
    table = Table("work", "B an element", "GPU", title=f"Least milliseconds ({HEADER.lower()})")
    bounds = ("bandwidth", "issue", "special", "products", "least")
    for title in bounds:
        table.add_column(title, justify="right")
    table.add_column("bound")
    table.add_column("published by others: measured")
    for line in lines:
        label = line["work"], f"{line['bytes']:.4g}, floor {line['floor']:.4g}"
        for gpu, it in line["gpus"].items():
            shown = [f"{it[name]:.4g}" if name in it else "" for name in bounds]
            table.add_row(*label, gpu, *shown, it["bound"], line["published"].get(gpu, ""))
            label = "", ""
        table.add_section()
    return table


def decoding_table(lines: list[dict[str, Any]]) -> Table:
    title = f"A decoding step, {gpu_steps.ROWS} rows of {gpu_steps.TOKENS} tokens, bfloat16"
    table = Table("model", title=f"{title} ({HEADER.lower()})")
    for column in ("kernels", "launched from Python, ms", *(f"read, {gpu}, ms" for gpu in GPUS)):
        table.add_column(column, justify="right")
    for line in lines:
        read = [f"{ms:.3g}" for ms in line["bytes_ms"].values()]
        table.add_row(line["model"], str(line["launches"]), f"{line['launch_ms']:.3g}", *read)
    return table


def updates_table(lines: list[dict[str, Any]]) -> Table:
    table = Table("model", "critic", "batch", title=f"An update, bfloat16 ({HEADER.lower()})")
    for column in gpu_updates.COLUMNS:
        table.add_column(f"{column}: padded / packed", justify="right")
    for line in lines:
        shown = gpu_updates.shown(line)
        table.add_row(line["model"], line["critic"], line["work"], *shown)
    return table


def main() -> None:
    console = Console(width=None if sys.stdout.isatty() else 180)
    report = compute(lambda name: console.print(f"[dim]{name}[/]", highlight=False))
    show(report, console)
    RESULT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
