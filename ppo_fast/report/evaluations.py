"""Evaluations over steps, with error bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ppo_fast.report.axes import short
from ppo_fast.report.charts import Line, chart, description, points_of
from ppo_fast.report.html import MISSING, Html, cut, element, joined
from ppo_fast.report.read import Run
from ppo_fast.report.tables import table
from ppo_fast.report.thin import spread

MOST_CHARTS, MOST_POINTS, MOST_ROWS = 24, 120, 100


def evaluations(runs: Sequence[Run], data: dict[str, Any]) -> Html | None:
    """Return charts of the evaluations and tables of the first and last; None if there are none.

    Args:
        data: what the page's script reads gets the points of each chart, by its name.
    """
    shown = [run for run in runs if run.evaluations]
    if not shown:
        return None
    names = [*dict.fromkeys(name for run in shown for one in run.evaluations for name in one)]
    kept = [
        n for n in names if n not in ("step", "time", "standard_error") and not n.endswith("/std")
    ]
    figures = [
        figure for i, name in enumerate(kept[:MOST_CHARTS])
        if (figure := _figure(f"evaluation-{i}", name, runs, data)) is not None
    ]  # fmt: skip
    return joined(
        element("div", *before_and_after(runs), class_="tables"),
        element("div", *figures, class_="charts") if figures else None,
    )


def _figure(name: str, metric: str, runs: Sequence[Run], data: dict[str, Any]) -> Html | None:
    lines = [line for i, run in enumerate(runs) if (line := _line(i, run, metric)) is not None]
    values = {value for line in lines for _, value in line.raw}
    if len(values) < 2 or not any(len(line.raw) > 1 for line in lines):
        return None  # the tables say it
    data[name] = [points_of(line) for line in lines]
    words = description(lines, [cut(run.name, 60) for run in runs])
    note = element("figcaption", element("p", "Bars: ± one standard error of the mean."))
    return element(
        "figure",
        element("h4", cut(metric, 80)),
        chart(name, f"{cut(metric, 80)} in evaluations", words, lines),
        note if any(line.bars for line in lines) else None,
    )


def _line(index: int, run: Run, metric: str) -> Line | None:
    found = [one for one in run.evaluations if one.get(metric) is not None]
    found = [found[i] for i in spread(len(found), MOST_POINTS)]
    if not found:
        return None
    points = [(float(one["step"]), one[metric]) for one in found]
    errors = [one.get("standard_error") for one in found] if metric == "reward" else []
    bars = [
        (step, value - error, value + error)
        for (step, value), error in zip(points, errors, strict=False) if error is not None
    ]  # fmt: skip
    return Line(index, raw=points, bars=bars)


def before_and_after(runs: Sequence[Run]) -> list[Html]:
    """Return, for each run with evaluations, a table of its first and its last."""
    found = []
    for run in runs:
        if not run.evaluations:
            continue
        first, last = run.evaluations[0], run.evaluations[-1]
        of = f" of {cut(run.name, 60)}" if len(runs) > 1 else ""
        names = [n for n in first if n not in ("step", "time", "standard_error")][:MOST_ROWS]
        if first is last:
            rows = [[cut(n, 60), _value(first, n)] for n in names]
            found.append(table(f"The one evaluation{of}", ["", f"step {first['step']}"], rows))
            continue
        rows = [
            [cut(n, 60), _value(first, n), _value(last, n), _change(first, last, n)] for n in names
        ]
        head = ["", f"step {first['step']}", f"step {last['step']}", "change"]
        found.append(table(f"First and last evaluation{of}", head, rows))
    return found


def with_error(evaluation: dict[str, Any]) -> str:
    """Return an evaluation's reward with its standard error."""
    error = evaluation.get("standard_error")
    spread = "" if error is None else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{short(error)}"
    return short(evaluation["reward"]) + spread


def _value(evaluation: dict[str, Any], name: str) -> str:
    value = evaluation.get(name)
    if value is None:
        return MISSING
    return with_error(evaluation) if name == "reward" else short(value)


def _change(first: dict[str, Any], last: dict[str, Any], name: str) -> str:
    before, after = first.get(name), last.get(name)
    if before is None or after is None:
        return MISSING
    return f"{'+' if after > before else ''}{short(after - before)}"
