"""The curves of metrics: a figure for each, with all runs in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ppo_fast.report.axes import number
from ppo_fast.report.charts import Line, chart, description, points_of
from ppo_fast.report.courses import Course
from ppo_fast.report.groups import Picture, pictures
from ppo_fast.report.html import Html, cut, element, joined
from ppo_fast.report.notes import healthy, note_of
from ppo_fast.report.read import Run
from ppo_fast.report.thin import smoothed, thin, thin_band

# Points of all lines of a page, and the most and least of one line.
ALL_POINTS, MOST_POINTS, LEAST_POINTS = 50_000, 360, 40
MOST_CHARTS = 120
EMPTY = Course()


def curves(runs: Sequence[Run], data: dict[str, Any]) -> Html:
    """Return the figures of all metrics, by groups.

    Args:
        data: what the page's script reads gets the points of each chart, by its name.
    """
    names = [*dict.fromkeys(name for run in runs for name in run.courses.by_name)]
    groups = pictures(names)
    charted = [picture.metric for group in groups.values() for picture in group]
    flat = {name: text for name in charted if (text := _constant(name, runs)) is not None}
    groups = {title: [p for p in group if p.metric not in flat] for title, group in groups.items()}
    left, shown = MOST_CHARTS, {}
    for title, group in groups.items():
        shown[title], left = group[:left], max(left - len(group), 0)
    count = sum(map(len, shown.values())) * len(runs)
    most = min(max(ALL_POINTS // max(count, 1), LEAST_POINTS), MOST_POINTS)
    parts, index = [], 0
    for title, group in shown.items():
        figures = []
        for picture in group:
            figures.append(_figure(f"chart-{index}", picture, runs, most, data))
            index += 1
        if figures:
            parts.append(element("h3", title))
            parts.append(element("div", *figures, class_="charts"))
    omitted = sum(map(len, groups.values())) - index
    if omitted:
        parts.append(element("p", f"{omitted} more metrics have no chart here.", class_="hint"))
    if flat:
        items = [element("li", element("code", name), f" {text}") for name, text in flat.items()]
        parts.append(element("h3", "Metrics that did not change"))
        parts.append(element("ul", *items, class_="defaults"))
    return joined(*parts)


def _constant(name: str, runs: Sequence[Run]) -> str | None:
    """Return the one value that a metric has in all runs and steps; None for another metric."""
    courses = [run.courses[name] for run in runs if name in run.courses]
    if sum(map(len, courses)) < 3 or any(healthy(name, course) for course in courses):
        return None
    if name.startswith("time/") or name == "mean_reward":
        return None
    values = {value for course in courses for value in (min(course.values), max(course.values))}
    return number(values.pop()) if len(values) == 1 else None


def _figure(
    name: str, picture: Picture, runs: Sequence[Run], most: int, data: dict[str, Any]
) -> Html:
    lines = [
        _line(index, run, picture, most)
        for index, run in enumerate(runs) if picture.metric in run.courses
    ]  # fmt: skip
    names = [cut(run.name, 60) for run in runs]
    data[name] = [points_of(line) for line in lines]
    return element(
        "figure",
        element(
            "div",
            element("h4", picture.metric),
            element("p", *_latest(picture.metric, runs), class_="latest"),
            class_="top",
        ),
        chart(name, picture.metric, description(lines, names), lines),
        element("figcaption", *_caption(picture, lines)),
    )


def _latest(metric: str, runs: Sequence[Run]) -> list[Html]:
    """Return the last value in each run."""
    found = []
    for index, run in enumerate(runs):
        if metric in run.courses:
            text = number(run.courses[metric].values[-1])
            key = element("i", class_=f"key r{index}") if len(runs) > 1 else None
            found.append(element("span", key, text))
    return found


def _caption(picture: Picture, lines: Sequence[Line]) -> list[Html]:
    note = note_of(picture.metric)
    bounds = [*dict.fromkeys(str(line.healthy) for line in lines if line.healthy)]
    parts = []
    if note.meaning:
        parts.append(element("p", _sentence(note.meaning)))
    if str(picture):
        parts.append(element("p", _sentence(str(picture))))
    if bounds:
        where = bounds[0] if len(bounds) == 1 else "; ".join(bounds)
        parts.append(element("p", "In a run that goes well: ", element("b", where), "."))
    if note.look:
        parts.append(element("p", element("b", "Look closer when: "), f"{note.look}."))
    return parts


def _sentence(words: str) -> str:
    """Return words with a capital, unless they begin with a symbol, and a full stop."""
    return f"{words[0].upper() if words[0].isascii() else words[0]}{words[1:]}."


def _line(index: int, run: Run, picture: Picture, most: int) -> Line:
    course = run.courses[picture.metric]
    steps, values = course.steps, course.values
    middle = run.courses.by_name.get(picture.middle or "", EMPTY)
    return Line(
        index,
        raw=thin(steps, values, most),
        smooth=smoothed(steps, values, most // 2) if len(course) > 5 else [],
        middle=smoothed(middle.steps, middle.values, most // 2),
        band=thin_band(*_band(run, picture), most // 2),
        healthy=healthy(picture.metric, course),
    )


def _band(run: Run, picture: Picture) -> tuple[list[float], list[float], list[float]]:
    """Return steps, lows and highs of a band; empty without one."""
    by_name = run.courses.by_name
    if picture.deviation in by_name:
        course, spread = by_name[picture.metric], by_name[picture.deviation]
        rows = [(s, v - d, v + d) for s, (v, d) in _both(course, spread).items()]
    elif picture.low in by_name and picture.high in by_name:
        both = _both(by_name[picture.low], by_name[picture.high])
        rows = [(step, low, high) for step, (low, high) in both.items()]
    else:
        rows = []
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def _both(first: Course, second: Course) -> dict[float, tuple[float, float]]:
    """Return the values of two courses at the steps that both have."""
    other = dict(zip(second.steps, second.values, strict=True))
    return {
        step: (value, other[step])
        for step, value in zip(first.steps, first.values, strict=True) if step in other
    }  # fmt: skip
