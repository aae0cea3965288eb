"""Tables, and texts of settings in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ppo_fast.report.html import Child, Html, cut, element
from ppo_fast.report.read import Run

LONGEST_VALUE, MOST_ITEMS = 300, 20


def table(caption: str, head: Sequence[Child], rows: Iterable[Sequence[Child]]) -> Html:
    """Return a table, which scrolls where it is too wide; a row's first cell is its head."""
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", c) for c in row[1:]))
        for row in rows
    ]
    heads = [element("th", cell, scope="col") for cell in head]
    titles = element("thead", element("tr", *heads)) if any(head) else None
    inside = element(
        "table",
        element("caption", caption),
        titles,
        element("tbody", *body),
    )
    return element("div", inside, class_="wide", tabindex="0", role="region", aria_label=caption)


def named(run: Run, index: int) -> Html:
    """Return a run's name with the colour of its lines."""
    return element("span", element("i", class_=f"key r{index}"), cut(run.name, 60))


def setting(run: Run, name: str) -> str | None:
    """Return a setting as a text; None if the run has none of this name."""
    value = run.config.get(name)
    return None if value is None or value == [] else value_text(value)


def value_text(value: Any) -> str:
    """Return a setting's value as a text of bounded length."""
    if isinstance(value, (list, tuple)):
        items = [cut(_plain(item), LONGEST_VALUE) for item in value[:MOST_ITEMS]]
        return cut(", ".join(items) or "none", LONGEST_VALUE)
    return cut(_plain(value), LONGEST_VALUE)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    if isinstance(value, (dict, list, tuple, set)):
        return f"{type(value).__name__} of {len(value)}"  # a file can nest them without an end
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return str(value) if abs(value) < 2**64 else f"a number of {value.bit_length()} bits"
    return str(value)
