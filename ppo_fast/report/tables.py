"""Tables of a page: what the runs were, their evaluations, settings and events."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from ppo_fast.config import PPOConfig
from ppo_fast.report.axes import number, short
from ppo_fast.report.html import MISSING, Child, Html, cut, element, joined
from ppo_fast.report.lines import as_step
from ppo_fast.report.notes import FIRST
from ppo_fast.report.read import Run
from ppo_fast.report.times import duration, parts_of

LONGEST_VALUE, MOST_SETTINGS, MOST_ITEMS = 300, 300, 20
LONGEST_EVENT = 1000
DEFAULTS = asdict(PPOConfig())


def table(caption: str, head: Iterable[Child], rows: Iterable[Sequence[Child]]) -> Html:
    """Return a table, which scrolls where it is too wide; a row's first cell is its head."""
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", c) for c in row[1:]))
        for row in rows
    ]
    heads = [element("th", cell, scope="col") for cell in head]
    inside = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *heads)),
        element("tbody", *body),
    )
    return element("div", inside, class_="wide", tabindex="0", role="region", aria_label=caption)


def named(run: Run, index: int) -> Html:
    """Return a run's name with the colour of its lines."""
    return element("span", element("i", class_=f"key r{index}"), cut(run.name, 60))


def summary(runs: Sequence[Run]) -> Html:
    """Return a table of what the runs were and how far they came, a column each."""
    rows = []
    for title, of in SUMMARY.items():
        cells = [of(run) for run in runs]
        if any(cells):
            rows.append([title, *(cell or MISSING for cell in cells)])
    heads = [named(run, i) for i, run in enumerate(runs)] if len(runs) > 1 else [""]
    return table("The runs" if len(runs) > 1 else "The run", ["", *heads], rows)


def setting(run: Run, name: str) -> str | None:
    """Return a setting as a text; None if the run has none of this name."""
    value = run.config.get(name)
    return None if value is None or value == [] else value_text(value)


def steps_done(run: Run) -> str:
    """Return the steps done, and of how many."""
    planned = run.config.get("num_steps")
    of = "" if as_step(planned) is None else f" of {planned:,}"
    return f"{run.courses.step:,}{of}"


def _responses(run: Run) -> str | None:
    prompts, each = run.config.get("batch_size"), run.config.get("samples_per_prompt", 1)
    if as_step(prompts) is None or as_step(each) is None:
        return None
    return f"{prompts} prompts, {each} samples of each" if each != 1 else f"{prompts} prompts"


def _critic(run: Run) -> str | None:
    return setting(run, "value_model") or setting(run, "critic")


def _trained(run: Run) -> str | None:
    layers, rank = setting(run, "num_layers_unfrozen"), setting(run, "lora_rank")
    where = f"top {layers} layers" if layers else "all layers"
    return f"LoRA of rank {rank}, {where}" if rank else f"{where}" if run.config else None


def _started(run: Run) -> str | None:
    if not len(run.courses.time):
        return None
    try:
        start = datetime.fromtimestamp(run.courses.time.values[0], UTC)
    except (OverflowError, OSError, ValueError):
        return None
    return f"{start:%Y-%m-%d %H:%M} UTC"


def time_taken(run: Run) -> str | None:
    """Return the time of all steps; None if the run has no times."""
    parts = parts_of(run)
    return duration(sum(sum(run.courses[name].values) for name in parts)) if parts else None


def _tokens(run: Run) -> str | None:
    return number(sum(run.courses["tokens"].values)) if "tokens" in run.courses else None


def _course(name: str) -> Any:
    def of(run: Run) -> str | None:
        if name not in run.courses:
            return None
        values = run.courses[name].values
        first, last = values[:FIRST], values[-FIRST:]
        if len(values) < 2 * FIRST:
            return f"{number(values[0])} → {number(values[-1])}"
        return f"{number(sum(first) / FIRST)} → {number(sum(last) / FIRST)}"

    return of


def _evaluated(run: Run) -> str | None:
    ends = [
        e for e in (run.evaluations[:1] + run.evaluations[1:][-1:]) if e.get("reward") is not None
    ]
    return " → ".join(with_error(e) for e in ends) or None


def with_error(evaluation: dict[str, Any]) -> str:
    """Return an evaluation's reward with its standard error."""
    error = evaluation.get("standard_error")
    spread = "" if error is None else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{short(error)}"
    return short(evaluation["reward"]) + spread
        f"\u00a0±\u00a0{number(error)}" if error is not None else ""
    )


def _warnings(run: Run) -> str | None:
    return str(sum(event.get("level") == "WARNING" for event in run.events)) if run.events else None


SUMMARY: dict[str, Any] = {
    "Policy": lambda run: setting(run, "policy"),
    "Reward": lambda run: setting(run, "reward"),
    "Prompts": lambda run: setting(run, "prompts"),
    "Critic": _critic,
    "Trained": _trained,
    "Steps": steps_done,
    "Of a step": _responses,
    "First step ended": _started,
    "Time of the steps": time_taken,
    "Tokens": _tokens,
    f"Mean reward, first → last {FIRST} steps": _course("mean_reward"),
    f"KL a sequence, first → last {FIRST} steps": _course("kl_sequence"),
    "Evaluated reward, first → last": _evaluated,
    "Warnings": _warnings,
}


def before_and_after(runs: Sequence[Run]) -> list[Html]:
    """Return, for each run with evaluations, a table of its first and its last."""
    found = []
    for run in runs:
        if not run.evaluations:
            continue
        first, last = run.evaluations[0], run.evaluations[-1]
        of = f" of {cut(run.name, 60)}" if len(runs) > 1 else ""
        names = [n for n in first if n not in ("step", "time", "standard_error")]
        if first is last:
            rows = [[n, _value(first, n)] for n in names]
            found.append(table(f"The one evaluation{of}", ["", f"step {first['step']}"], rows))
            continue
        rows = [[n, _value(first, n), _value(last, n), _change(first, last, n)] for n in names]
        head = ["", f"step {first['step']}", f"step {last['step']}", "change"]
        found.append(table(f"First and last evaluation{of}", head, rows))
    return found


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
