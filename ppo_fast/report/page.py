"""The page of ``ppo-fast report``: one file of HTML that loads nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ppo_fast.disk.files import written
from ppo_fast.report.curves import curves
from ppo_fast.report.evaluations import evaluations
from ppo_fast.report.events import events
from ppo_fast.report.html import Html, cut, element, embedded, joined
from ppo_fast.report.read import Run
from ppo_fast.report.samples import samples
from ppo_fast.report.settings import settings
from ppo_fast.report.summary import summary
from ppo_fast.report.tables import named
from ppo_fast.report.times import times


def write_page(path: Path, runs: Sequence[Run]) -> None:
    """Write the page of some runs to a file, whole or not at all."""
    contents = page(runs).encode("utf-8")
    with written(path) as file:
        file.write(contents)


def page(runs: Sequence[Run]) -> str:
    """Return the page of some runs. The same folders make the same page, on every machine."""
    data: dict[str, Any] = {}
    sections = [
        ("summary", "Summary", summary(runs)),
        ("evaluations", "Evaluations", evaluations(runs, data)),
        ("events", "Events and warnings", joined(*events(runs)) or None),
        ("curves", "Metrics over steps", _curves(runs, data)),
        ("time", "Time by part", times(runs)),
        ("samples", "Samples, before and after", samples(runs)),
        ("settings", "Settings", joined(*settings(runs)) or None),
    ]
    shown = [section for section in sections if section[2] is not None]
    names = ", ".join(cut(run.name, 60) for run in runs)
    links = [element("a", title, href=f"#{name}") for name, title, _ in shown]
    body = [
        element("a", "To the contents", class_="skip", href="#main"),
        element("header", element("p", "ppo_fast", class_="brand"), element("h1", names),
                element("nav", *links, aria_label="Sections")),
        element("main", *(_section(*section) for section in shown), id="main"),
        element("script", embedded({"names": [cut(run.name, 60) for run in runs], "charts": data}),
                type="application/json", id="data"),
    ]  # fmt: skip
    return f"<!DOCTYPE html>\n{_document(f'{names} - ppo_fast report', body)}\n"


def _document(title: str, body: Sequence[Html]) -> Html:
    style, script = _own("page.css"), _own("page.js")
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title),
        element("style", style),
    )
    return element("html", head, element("body", *body, element("script", script)), lang="en")


def _own(name: str) -> Html:
    """Return a file of this package: CSS or a script."""
    return Html(files("ppo_fast.report").joinpath(name).read_text("utf-8"))


def _hash(text: str) -> str:
    """Return what a Content-Security-Policy allows a script or a style by."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _section(name: str, title: str, contents: Html | None) -> Html:
    return element("section", element("h2", title), contents, id=name)


def _curves(runs: Sequence[Run], data: dict[str, Any]) -> Html:
    if not any(len(course) for run in runs for course in run.courses.by_name.values()):
        return element("p", "No step is done yet.")
    key = [named(run, index) for index, run in enumerate(runs)] if len(runs) > 1 else []
    words = (
        "Thin: the steps; thick: their running mean; pale: the band named under a chart; "
        "dashed: bounds of a run that goes well."
    )
    return joined(
        element("p", *key, class_="legend") if key else None,
        element("p", words, class_="hint"),
        element("div", curves(runs, data), class_="several" if key else None),
    )
