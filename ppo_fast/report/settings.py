"""The settings of runs, with their differences from the defaults and from one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ppo_fast.config import PPOConfig
from ppo_fast.report.html import MISSING, Html, cut, element, joined
from ppo_fast.report.read import Run
from ppo_fast.report.tables import named, setting, table, value_text

MOST_SETTINGS = 300
DEFAULTS = asdict(PPOConfig())


def settings(runs: Sequence[Run]) -> list[Html]:
    """Return the differences between runs, and the settings of each."""
    found = []
    if len(runs) > 1:
        names = [*dict.fromkeys(name for run in runs for name in run.config)][:MOST_SETTINGS]
        rows = []
        for name in names:
            texts = [setting(run, name) or MISSING for run in runs]
            if len({*texts}) > 1:
                rows.append([cut(name, 80), *texts])
        if rows:
            head = ["", *(named(run, i) for i, run in enumerate(runs))]
            found.append(table("What differs between the runs", head, rows))
        else:
            found.append(element("p", "All settings of the runs are the same."))
    found += [part for run in runs if run.config for part in _settings(run, len(runs) > 1)]
    return found


def _settings(run: Run, several: bool) -> list[Html]:
    """Return the settings of a run: changed ones of PPOConfig, the run's own, defaults."""
    name = f"{cut(run.name, 60)}: " if several else ""
    shown = [*run.config.items()][:MOST_SETTINGS]
    own = [
        [cut(k, 80), value_text(v)] for k, v in shown if k not in DEFAULTS and v not in (None, [])
    ]
    known = [(k, v) for k, v in shown if k in DEFAULTS]
    changed = [
        [element("mark", k), value_text(v), value_text(DEFAULTS[k])]
        for k, v in known if not _same(v, DEFAULTS[k])
    ]  # fmt: skip
    same = [(k, value_text(v)) for k, v in known if _same(v, DEFAULTS[k])]
    parts = [table("Settings of PPOConfig that differ from its defaults",
                   ["", "here", "default"], changed)] if changed else []  # fmt: skip
    parts.append(table("Settings of the run", ["", "here"], own))
    if same:
        items = [element("li", element("code", k), f" {v}") for k, v in same]
        title = element("summary", f"{len(same)} settings that are PPOConfig's defaults")
        parts.append(element("details", title, element("ul", *items, class_="defaults")))
    count = f"{name}{len(changed)} of {len(known)} settings differ from PPOConfig's defaults"
    return [element("details", element("summary", count), joined(*parts), open=not several)]


def _same(value: Any, default: Any) -> bool:
    plain = list(default) if isinstance(default, tuple) else default
    return bool(value == plain and isinstance(value, bool) == isinstance(plain, bool))
