"""The events of runs: warnings, changes on request, resumes, stops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ppo_fast.report.html import Html, cut, element
from ppo_fast.report.read import Run

LONGEST_EVENT = 1000


def events(runs: Sequence[Run]) -> list[Html]:
    """Return, for each run with events, a list of them."""
    found = []
    for run in runs:
        if not run.events:
            continue
        if len(runs) > 1:
            found.append(element("h3", cut(run.name, 60)))
        left = run.event_count - len(run.events)
        if left:
            found.append(element("p", f"The first {left:,} events are left out.", class_="hint"))
        found.append(element("ol", *map(_event, run.events), class_="events"))
    return found


def _event(event: dict[str, Any]) -> Html:
    head = element(
        "p",
        element("span", cut(event.get("level", ""), 20), class_=_level(event)),
        f" step {event['step']}, {cut(event.get('source', ''), 80)}",
        class_="level",
    )
    return element("li", head, element("p", cut(event.get("text", ""), LONGEST_EVENT)))


def _level(event: dict[str, Any]) -> str:
    return "warning" if event.get("level") in ("WARNING", "ERROR", "CRITICAL") else "level"
