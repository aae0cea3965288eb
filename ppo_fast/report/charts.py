"""Charts of courses over steps, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ppo_fast.report.axes import Axis, inner_range, number, tick_labels, ticks, widened
from ppo_fast.report.html import Html, element, joined
from ppo_fast.report.notes import Healthy
from ppo_fast.report.thin import Points

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 24
ACROSS = WIDTH - LEFT - RIGHT


@dataclass(frozen=True)
class Line:
    """The line of one run in a chart, with its band and bars.

    run: its index, which its colour is by.
    raw, smooth: points (step, value).
    middle: points of a quantile in the middle of the band.
    band: points (step, low, high).
    bars: points (step, low, high), drawn as error bars, and ``raw`` with dots.
    healthy: bounds of the metric.
    """

    run: int
    raw: Points = field(default_factory=list)
    smooth: Points = field(default_factory=list)
    middle: Points = field(default_factory=list)
    band: Sequence[tuple[float, float, float]] = ()
    bars: Sequence[tuple[float, float, float]] = ()
    healthy: Healthy | None = None


def chart(name: str, title: str, description: str, lines: Sequence[Line]) -> Html:
    """Return a chart.

    Args:
        name: unique on the page, in ASCII letters, digits and "-".
        title, description: for readers who do not see it.
        lines: not empty, and one at least with a raw point.
    """
    across, up, outside = _axes(lines)
    inside = element(
        "svg",
        *_healthy(lines, up),
        *(_band(line, across, up) for line in lines),
        *(_curve(line, across, up) for line in lines),
        x=LEFT - 4, y=TOP, width=ACROSS + 8, height=HEIGHT - TOP - BOTTOM,
        viewBox=f"{LEFT - 4} {TOP} {ACROSS + 8} {HEIGHT - TOP - BOTTOM}",
    )  # fmt: skip
    if outside:
        description += f" {outside} values lie outside of the picture."
    return element(
        "svg",
        element("title", title, id=f"{name}-title"),
        element("desc", description, id=f"{name}-desc"),
        grid(across, up),
        inside,
        class_="chart", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", id=name,
        aria_labelledby=f"{name}-title", aria_describedby=f"{name}-desc",
        data_low=f"{across.low:.10g}", data_high=f"{across.high:.10g}",
    )  # fmt: skip


def _axes(lines: Sequence[Line]) -> tuple[Axis, Axis, int]:
    """Return both axes, and how many raw values lie outside of them."""
    steps = [step for line in lines for step, _ in line.raw]
    shown = [value for line in lines for _, value in (*line.raw, *line.smooth, *line.middle)]
    shown += [end for line in lines for _, *ends in (*line.band, *line.bars) for end in ends]
    low, high = inner_range(shown)
    low, high = _with_bounds(low, high, lines)
    up = Axis(*widened(low, high), HEIGHT - BOTTOM, TOP)
    outside = sum(not up.low <= value <= up.high for line in lines for _, value in line.raw)
    first, last = min(steps), max(steps)
    if first == last:
        first, last = first - 1, last + 1
    return Axis(first, last, LEFT, WIDTH - RIGHT), up, outside


def bounds_of(line: Line) -> tuple[float | None, float | None]:
    """Return the lowest and the highest value of a run that goes well; None: no bound."""
    return (None, None) if line.healthy is None else (line.healthy.low, line.healthy.high)


def _with_bounds(low: float, high: float, lines: Sequence[Line]) -> tuple[float, float]:
    """Return a range with the healthy bounds that lie near."""
    width = (high - low) or abs(high)
    for line in lines:
        for bound in bounds_of(line):
            if bound is not None and low - width / 2 <= bound <= high + width / 2:
                low, high = min(low, bound), max(high, bound)
    return low, high


def grid(across: Axis, up: Axis, *, label: str = "step") -> Html:
    """Return the lines and numbers of both axes."""
    parts = []
    levels = ticks(up.low, up.high, 4)
    for value, text in zip(levels, tick_labels(levels), strict=True):
        y = up.at(value)
        parts += [
            element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"),
            element("text", text, x=LEFT - 6, y=y + 3.5, class_="tick end"),
        ]
    found = [step for step in ticks(across.low, across.high, 5) if step == round(step)]
    for value, text in zip(found, tick_labels(found), strict=True):
        x = across.at(value)
        anchor = "end" if x + 3 * len(text) > WIDTH else "middle"
        parts.append(element("text", text, x=x, y=HEIGHT - 8, class_=f"tick {anchor}"))
    parts.append(element("text", label, x=LEFT - 16, y=HEIGHT - 8, class_="tick end"))
    return element("g", *parts, aria_hidden="true")


def _healthy(lines: Sequence[Line], up: Axis) -> list[Html]:
    """Return lines at the bounds; what lies beyond them is tinted where all runs have the same."""
    parts = []
    same = len({line.healthy for line in lines}) == 1
    for line in lines[:1] if same else lines:
        low, high = bounds_of(line)
        for bound, edge in ((low, HEIGHT - BOTTOM), (high, TOP)):
            if bound is None or not up.low < bound < up.high:
                continue
            y = up.at(bound)
            if same:
                top, tall = min(y, edge), round(abs(y - edge), 1)
                parts.append(
                    element("rect", x=LEFT, y=top, width=ACROSS, height=tall, class_="beyond")
                )
            kind = "bound" if same else f"bound r{line.run}"
            parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_=kind))
    return parts


def _band(line: Line, across: Axis, up: Axis) -> Html | None:
    if len(line.band) < 2:
        return None
    there = [f"{across.at(step)},{up.at(high)}" for step, _, high in line.band]
    back = [f"{across.at(step)},{up.at(low)}" for step, low, _ in reversed(line.band)]
    return element("polygon", points=" ".join(there + back), class_=f"band r{line.run}")


def _curve(line: Line, across: Axis, up: Axis) -> Html:
    kind = f"r{line.run}"
    parts = []
    for step, low, high in line.bars:
        x = across.at(step)
        parts.append(
            element("line", x1=x, x2=x, y1=up.at(low), y2=up.at(high), class_=f"bar {kind}")
        )
    for name, points in (("middle", line.middle), ("raw", line.raw), ("smooth", line.smooth)):
        if len(points) > 1:
            if name == "raw" and not line.smooth:
                name = "smooth"
            parts.append(polyline(points, across, up, f"{name} {kind}"))
    if line.bars or len(line.raw) == 1:
        parts += [
            element("circle", cx=across.at(step), cy=up.at(value), r=3, class_=f"dot {kind}")
            for step, value in line.raw
        ]
    return joined(*parts)


def polyline(points: Points, across: Axis, up: Axis, kind: str) -> Html:
    """Return a line through points."""
    places = " ".join(f"{across.at(step)},{up.at(value)}" for step, value in points)
    return element("polyline", points=places, class_=kind)


def points_of(line: Line) -> dict[str, Any]:
    """Return the points of a line, for the page's script."""
    points = [[int(step), float(f"{value:.5g}")] for step, value in line.raw]
    return {"run": line.run, "points": points}


def description(lines: Sequence[Line], names: Sequence[str]) -> str:
    """Return in words what a chart of some runs shows."""
    found = []
    for line in lines:
        (first, begin), (last, end) = line.raw[0], line.raw[-1]
        found.append(
            f"{names[line.run]}: {number(begin)} at step {first:.0f}, "
            f"{number(end)} at step {last:.0f}."
        )
    return " ".join(found)
