"""The time that the parts of a step take, stacked."""

from __future__ import annotations

from collections.abc import Sequence

from ppo_fast.report.axes import Axis, number
from ppo_fast.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, grid
from ppo_fast.report.html import MISSING, Html, cut, element, joined
from ppo_fast.report.read import Run
from ppo_fast.report.thin import thin_band

MOST_PARTS, MOST_POINTS = 6, 120


def times(runs: Sequence[Run]) -> Html | None:
    """Return a chart for each run and a table of means; None where no run has times."""
    shown = [(run, parts) for run in runs if (parts := parts_of(run))]
    if not shown:
        return None
    names = [*dict.fromkeys(name for _, parts in shown for name in parts)]
    key = [
        element("span", element("i", class_=f"key s{i}"), cut(name.removeprefix("time/"), 40))
        for i, name in enumerate(names)
    ]
    figures = [
        element(
            "figure",
            element("h4", cut(run.name, 60)),
            _stack(f"time-{i}", run, parts, names),
            element("figcaption", element("p", "Seconds of each step.")),
        )
        for i, (run, parts) in enumerate(shown)
    ]
    return joined(
        element("p", *key, class_="legend"),
        element("div", *figures, class_="charts"),
        _table(shown, names),
    )


def parts_of(run: Run) -> list[str]:
    """Return the metrics that hold seconds of a step's parts."""
    return [name for name in run.courses.by_name if name.startswith("time/")][:MOST_PARTS]


def _stack(name: str, run: Run, parts: Sequence[str], names: Sequence[str]) -> Html:
    rows = _rows(run, parts)
    first, last = rows[0][0], rows[-1][0]
    if first == last:
        first, last = first - 1, last + 1
    across = Axis(first, last, LEFT, WIDTH - RIGHT)
    up = Axis(0.0, max(sum(row[1:]) for row in rows) * 1.05 or 1.0, HEIGHT - BOTTOM, TOP)
    areas, floor = [], [0.0] * len(rows)
    for i, part in enumerate(parts):
        top = [low + max(row[i + 1], 0.0) for low, row in zip(floor, rows, strict=True)]
        areas.append(_area([row[0] for row in rows], floor, top, across, up, names.index(part)))
        floor = top
    words = f"Seconds of a step by part, from step {rows[0][0]:.0f} to step {rows[-1][0]:.0f}."
    return element(
        "svg",
        element("title", f"Time of {cut(run.name, 60)}", id=f"{name}-title"),
        element("desc", words, id=f"{name}-desc"),
        grid(across, up),
        *areas,
        class_="chart", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", id=name,
        aria_labelledby=f"{name}-title", aria_describedby=f"{name}-desc",
    )  # fmt: skip


def _rows(run: Run, parts: Sequence[str]) -> list[list[float]]:
    """Return rows of a step and the seconds of each part; a part that a step lacks has 0."""
    steps = sorted({step for name in parts for step in run.courses[name].steps})
    columns = []
    for name in parts:
        course = run.courses[name]
        values = dict(zip(course.steps, course.values, strict=True))
        column = [values.get(step, 0.0) for step in steps]
        columns.append([low for _, low, _ in thin_band(steps, column, column, MOST_POINTS)])
    thinned = [step for step, _, _ in thin_band(steps, steps, steps, MOST_POINTS)]
    return [[*row] for row in zip(thinned, *columns, strict=True)]


def _area(
    steps: Sequence[float], low: Sequence[float], high: Sequence[float],
    across: Axis, up: Axis, index: int,
) -> Html:  # fmt: skip
    if len(steps) == 1:
        steps, low, high = [across.low, across.high], [*low] * 2, [*high] * 2
    there = [f"{across.at(s)},{up.at(v)}" for s, v in zip(steps, high, strict=True)]
    back = [f"{across.at(s)},{up.at(v)}" for s, v in zip(steps, low, strict=True)][::-1]
    return element("polygon", points=" ".join(there + back), class_=f"area s{index}")


def _table(shown: Sequence[tuple[Run, list[str]]], names: Sequence[str]) -> Html:
    titles = [
        "run",
        *(cut(name.removeprefix("time/"), 40) for name in names),
        "a step",
        "all steps",
    ]
    heads = [element("th", title, scope="col") for title in titles]
    rows = []
    for run, parts in shown:
        means = {name: run.courses[name].mean_of_last(len(run.courses[name])) for name in parts}
        whole = sum(means.values())
        cells = [
            f"{number(means[name])} s ({means[name] / whole:.0%})"
            if name in means and whole
            else MISSING
            for name in names
        ]
        total = sum(sum(run.courses[name].values) for name in parts)
        cells += [f"{number(whole)} s", duration(total)]
        rows.append(element("tr", element("th", cut(run.name, 60), scope="row"),
                            *(element("td", cell) for cell in cells)))  # fmt: skip
    head = element("thead", element("tr", *heads))
    table = element("table", element("caption", "Mean seconds of a step"), head,
                    element("tbody", *rows))  # fmt: skip
    return element("div", table, class_="wide")


def duration(seconds: float) -> str:
    """Return a time in the two units that fit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.0f} min"
    hours, rest = divmod(round(minutes), 60)
    return f"{hours} h {rest} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
