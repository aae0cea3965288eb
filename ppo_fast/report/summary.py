"""The report's table of runs: settings, steps done and last metrics of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from ppo_fast.report.axes import number, short
from ppo_fast.report.evaluations import with_error
from ppo_fast.report.html import MISSING, Html, element, joined
from ppo_fast.report.lines import as_step
from ppo_fast.report.notes import FIRST
from ppo_fast.report.read import Run
from ppo_fast.report.tables import named, setting, table
from ppo_fast.report.times import duration, parts_of


def summary(runs: Sequence[Run]) -> Html:
    """Return the main numbers of a run, large, if there is one; and a table of all runs."""
    return joined(_tiles(runs[0]) if len(runs) == 1 else None, _table(runs))


def _tiles(run: Run) -> Html:
    """Return the main numbers of a run, large."""
    shown = [("steps", steps_done(run))]
    ends = run.evaluations[:1] + run.evaluations[1:][-1:]
    rewards = [one for one in ends if one.get("reward") is not None]
    if rewards:
        shown.append(("evaluated reward", " → ".join(short(one["reward"]) for one in rewards)))
    elif "mean_reward" in run.courses:
        values = run.courses["mean_reward"].values
        shown.append(("mean reward", f"{short(values[0])} → {short(values[-1])}"))
    if "kl_sequence" in run.courses:
        shown.append(("KL, nats a sequence", short(run.courses["kl_sequence"].values[-1])))
    if (taken := time_taken(run)) is not None:
        shown.append(("time of the steps", taken))
    tiles = [
        element("div", element("span", text, class_="large"), element("span", name))
        for name, text in shown
    ]
    return element("div", *tiles, class_="tiles")


def _table(runs: Sequence[Run]) -> Html:
    """Return a table of what the runs were and how far they came, a column each."""
    rows = []
    for title, of in SUMMARY.items():
        cells = [of(run) for run in runs]
        if any(cells):
            rows.append([title, *(cell or MISSING for cell in cells)])
    heads = [named(run, i) for i, run in enumerate(runs)] if len(runs) > 1 else [""]
    return table("The runs" if len(runs) > 1 else "The run", ["", *heads], rows)


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


def _course(name: str) -> Callable[[Run], str | None]:
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


def _warnings(run: Run) -> str | None:
    return str(sum(event.get("level") == "WARNING" for event in run.events)) if run.events else None


SUMMARY: dict[str, Callable[[Run], str | None]] = {
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
