"""Writes the tables of README.md from results/*.json: `python benchmarks/report.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sides import ratios_to_ours

HERE = Path(__file__).parent
MARK = "<!-- From here on written by report.py. -->\n"
TITLES = {"cpu": "On the CPU", "baselines": "Against TRL and torchrl"}  # results/NAME.json


def main() -> None:
    readme = HERE / "README.md"
    intro, mark, _ = readme.read_text().partition(MARK)
    files = [HERE / "results" / f"{name}.json" for name in TITLES]
    sections = [section(path) for path in files if path.exists()]
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
    """Marks the best of several eager forms: the one that others compare with is not always it."""
    eager = {other: amount for other, amount in sides.items() if other.startswith("eager, ")}
    best = len(eager) > 1 and name == min(eager, key=lambda other: eager[other])
    return " (the best eager form)" if best else ""


if __name__ == "__main__":
    main()
