"""Print memory plans as a table."""

from __future__ import annotations

from dataclasses import fields

from rich.console import Console
from rich.table import Table

from ppo_fast.diagnostics.memory_plan import MARGIN, MemoryPlan


def show_plans(
    console: Console,
    found: dict[str, MemoryPlan],
    memory_gb: float | None,
    in_bfloat16: dict[str, MemoryPlan] | None = None,
) -> None:
    """Print a table with one column per plan, in GB (10^9 bytes).

    Of ``in_bfloat16``, the same plans with compute_dtype="bfloat16", it shows the sums.
    """
    table = Table(title="memory of a run in GB, computed from the config")
    table.add_column("", min_width=14)
    for name in found:
        table.add_column(name, justify="right")
    parts = [item.name for item in fields(MemoryPlan) if item.name not in ("offload", "piece")]
    rests = [plan.offload for plan in found.values() if plan.offload]
    for part in (*parts, "peak", *(["host"] if rests else [])):
        sizes = [f"{getattr(plan, part) / 1e9:.2f}" for plan in found.values()]
        name = f"in host memory: {', '.join(rests[0])}" if part == "host" else part
        table.add_row(name.replace("_", " "), *sizes, end_section=part == parts[-1])
    margin = f"with a margin of {MARGIN:.0%}"
    _add_sums(table, margin, found, memory_gb)
    if in_bfloat16 is not None:
        _add_sums(table, f"{margin}, computed in bfloat16", in_bfloat16, memory_gb)
    console.print(table)


def _add_sums(
    table: Table, name: str, found: dict[str, MemoryPlan], memory_gb: float | None
) -> None:
    """Add a row of the peaks with their margins and, if ``memory_gb`` is given, which ones fit."""
    sums = [plan.with_margin / 1e9 for plan in found.values()]
    table.add_row(name, *(f"{size:.2f}" for size in sums), end_section=memory_gb is None)
    if memory_gb is not None:
        fits = ["yes" if size <= memory_gb else "no" for size in sums]
        table.add_row(f"fits {memory_gb:g} GB", *fits, end_section=True)
