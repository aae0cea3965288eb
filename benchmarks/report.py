"""Write the tables of README.md from results/*.json: `python benchmarks/report.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent / "gpu_computed"))
sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))

from gpu_steps import LAUNCH_US, ROWS, TOKENS
from gpu_updates import COLUMNS, shown
from sides import ratios_to_ours

HERE = Path(__file__).parent
MARK = "<!-- From here on written by report.py. -->\n"
TITLES = {  # of results/NAME.json
    "cpu": "Operations, on the CPU",
    "steps": "Steps and decoding of SmolLM2-135M, on the CPU",
    "baselines": "Against TRL and torchrl",
    "trl_ppo": "Whole steps, against TRL's PPOTrainer",
}
COMPUTED = "gpu_computed"  # written by gpu_report.py; other names are those of GPUs


def main() -> None:
    readme = HERE / "README.md"
    intro, mark, _ = readme.read_text().partition(MARK)
    results = {path.stem: path for path in sorted((HERE / "results").glob("*.json"))}
    sections = [section(results[name]) for name in TITLES if name in results]
    sections += [
        gpu_section(results[name]) for name in sorted(results.keys() - {*TITLES, COMPUTED})
    ]
    sections += [computed_section(results[COMPUTED])] if COMPUTED in results else []
    readme.write_text(intro + mark + "".join(sections))


def section(path: Path) -> str:
    run = json.loads(path.read_text())
    machines = [b for b in run["benchmarks"] if b["work"].startswith("machine: ")]
    works = [b for b in run["benchmarks"] if b not in machines]
    lines = [
        f"\n## {TITLES[path.stem]}\n",
        about(run["machine_info"], run["datetime"]),
        *map(ceiling, machines),
    ]
    lines += ["", "| work | side | takes | ratio |", "|---|---|---|---|"]
    for work in works:
        lines += rows(work)
    return "\n".join(lines) + "\n"


def about(machine: dict[str, Any], date: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['kernels']} kernels, Python {machine['python_version']}, {versions}; "
        f"{date[:10]}.\n"
    )


def ceiling(benchmark: dict[str, Any]) -> str:
    (rate,) = benchmark["sides"].values()
    return f"- {benchmark['work'].removeprefix('machine: ')}: {rate:.1f} {benchmark['unit']}"


def rows(benchmark: dict[str, Any]) -> list[str]:
    work, sides, unit = benchmark["work"], benchmark["sides"], benchmark["unit"]
    table = []
    for name, amount in sides.items():
        shown = f"{amount:.0f}" if amount >= 100 else f"{amount:.3g}"
        ratio = " / ".join(ratios_to_ours(name, sides))
        table.append(f"| {work} | {name}{remark(name, sides)} | {shown} {unit} | {ratio} |")
        work = ""
    return table


def remark(name: str, sides: dict[str, float]) -> str:
    """Mark the best of several eager forms: others do not always compare with that one."""
    eager = {other: amount for other, amount in sides.items() if other.startswith("eager, ")}
    best = len(eager) > 1 and name == min(eager, key=lambda other: eager[other])
    return " (the best eager form)" if best else ""


def gpu_section(path: Path) -> str:
    """Return the section of what test_bench_gpu.py measured on one GPU."""
    run = json.loads(path.read_text())
    copying, *works = run["benchmarks"]
    (copy_rate,) = copying["sides"].values()
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines = [f"\n## On {run['gpu']}\n", f"{versions}; {run['datetime'][:10]}.\n"]
    lines += [ceiling(copying), "", "| work | side | takes | ratio | GB/s | peak memory |"]
    lines.append("|---|---|---|---|---|---|")
    for work in works:
        label, sides = work["work"], work["sides"]
        for name, ms in sides.items():
            ratio = " / ".join(ratios_to_ours(name, sides))
            rate = work["bytes"] / ms / 1e6
            of_copy = f"{rate:.0f} ({rate / copy_rate:.0%})" if rate else ""
            memory = f"{work['megabytes'][name]:.0f} MB"
            lines.append(f"| {label} | {name} | {ms:.3g} ms | {ratio} | {of_copy} | {memory} |")
            label = ""
        lines += [f"|  | {name} | {why} | | | |" for name, why in work["missing"].items()]
    return "\n".join(lines) + "\n"


def computed_section(path: Path) -> str:
    """Return the section of what gpu_report.py computed: a line a kernel and a line a work."""
    run = json.loads(path.read_text())
    gpus, archs = run["gpus"], ("80", "89", "90", "120")
    lines = [
        "\n## The Triton kernels: computed, not measured\n",
        f"{run['caveat']}\n",
        "Bytes and instructions an element (for sm_90), registers and occupancy for sm_"
        f"{' / '.join(archs)}. All the figures: `python benchmarks/gpu_computed/gpu_report.py`.\n",
        "| kernel | registers | occupancy, % | shared, B | B | instructions |",
        "|---|---|---|---|---|---|",
    ]
    for line in run["kernels"]:
        by_arch = [line["arch"][arch] for arch in archs]
        registers = " / ".join(str(it["registers"]) for it in by_arch)
        occupancy = " / ".join(f"{100 * it['occupancy']:.0f}" for it in by_arch)
        it = line["arch"]["90"]
        lines.append(
            f"| {line['kernel'].removesuffix('_kernel')}, {line['dtype']} | {registers} | "
            f"{occupancy} | {it['shared']} | {it['bytes']:.3g} | {it['instructions']:.3g} |"
        )
    lines += [
        "\nLeast milliseconds; the bound is bandwidth where none is named. Bytes an element, moved "
        "by the kernels (not by products) and beside it the floor: what launchers are given and "
        "return.\n",
        f"| work | B (floor) | {' | '.join(gpus)} | published by others, measured, ms |",
        "|---|---|" + len(gpus) * "---|" + "---|",
    ]
    for line in run["works"]:
        least = [
            f"{it['least']:.3g}" + (f" {it['bound']}" if it["bound"] != "bandwidth" else "")
            for it in line["gpus"].values()
        ]
        published = "; ".join(f"{gpu}: {text}" for gpu, text in line["published"].items())
        lines.append(
            f"| {line['work']} | {line['bytes']:.3g} ({line['floor']:.3g}) | "
            f"{' | '.join(least)} | {published} |"
        )
    lines += decoding_lines(run["decoding"], gpus) + update_lines(run["updates"])
    return "\n".join(lines) + "\n"


def decoding_lines(steps: list[dict[str, Any]], gpus: dict[str, Any]) -> list[str]:
    lines = [
        f"\nA decoding step of {ROWS} rows of {TOKENS} tokens in bfloat16: the kernels it launches "
        f"(counted in a recording of its operations), the least time of launching them one by one "
        f"from Python ({LAUNCH_US:.0f} us each), which a CUDA graph does at once, and of reading "
        "weights, keys and values, in milliseconds.\n",
        f"| model | kernels | launches from Python | reading: {' | '.join(gpus)} |",
        "|---|---|---|" + len(gpus) * "---|",
    ]
    for step in steps:
        read = " | ".join(f"{ms:.3g}" for ms in step["bytes_ms"].values())
        lines.append(f"| {step['model']} | {step['launches']} | {step['launch_ms']:.3g} | {read} |")
    return lines


def update_lines(updates: list[dict[str, Any]]) -> list[str]:
    lines = [
        "\nAn update of one epoch in one minibatch, weights and states in bfloat16: computed, not "
        "measured. With padding (`padding_free=False`) and without, padded / packed: the tokens in "
        "all passes, the kernels launched (least number: one an operation), what these read and "
        "write (each tensor once a kernel), and operations of products and attention. A microbatch "
        "has at most 16384 tokens: two with padding, one without. Counted while the learner trains "
        "models of true sizes without values; the optimizer's step, the same in both, is left "
        "out.\n",
        f"| model, critic | batch | {' | '.join(COLUMNS)} |",
        "|---|---|" + len(COLUMNS) * "---|",
    ]
    for line in updates:
        label = f"{line['model']}, {line['critic']}"
        lines.append(f"| {label} | {line['work']} | {' | '.join(shown(line))} |")
    return lines


if __name__ == "__main__":
    main()
