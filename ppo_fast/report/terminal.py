"""Pictures of a run on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ppo_fast.report.axes import number
from ppo_fast.report.courses import Course
from ppo_fast.report.html import cut
from ppo_fast.report.lines import as_number
from ppo_fast.report.notes import healthy
from ppo_fast.report.samples import text_of
from ppo_fast.report.times import duration
from ppo_fast.report.watched import Watched
from ppo_fast.runs.plain_text import plain

# Metrics that are shown, where the run has them, and before them those of single rewards.
SHOWN = (
    "mean_reward",
    "reward_std",
    "kl_sequence",
    "entropy",
    "response_length",
    "finished_fraction",
    "clip_fraction",
    "approx_kl",
    "value_loss",
    "explained_variance",
    "policy_grad_norm",
    "learning_rate",
    "time/rollout",
    "time/update",
)
MOST_REWARDS = 4
BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-:=+*#"
WIDTH = 24  # of a sparkline
LAST = 10  # steps of the mean
LONGEST_TEXT = 400


class Picture:
    """The lines of a run that ``ppo-fast watch`` prints, by rich."""

    def __init__(self, run: Watched) -> None:
        self.run = run

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        run = self.run
        yield plain(head(run))
        if not run.courses.step:
            yield Text("No step is done yet.", style="dim")
        elif run.num_steps:
            bar = Table.grid()
            bar.add_row(ProgressBar(total=run.num_steps, completed=run.courses.step, width=60))
            yield bar
        if (silence := run.silence()) is not None:
            words = f"No step for {duration(silence)}: has the run ended?"
            yield Text(words, style="yellow")
        yield metrics(run, BLOCKS if not options.ascii_only else ASCII_BLOCKS)
        yield from evaluations(run)
        yield from events(run)
        yield from sample(run)


def head(run: Watched) -> str:
    """Return a run's name, its steps and its times in a line."""
    step, of = run.courses.step, run.num_steps
    parts = [run.folder.resolve().name, f"step {step:,}" + (f" of {of:,}" if of else "")]
    if (each := run.seconds_a_step()) is not None:
        parts.append(f"{number(round(each, 2))} s a step")
    if of and step >= of:
        parts.append("all steps are done")
    elif (left := run.seconds_left()) is not None:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def metrics(run: Watched, blocks: str) -> Table:
    """Return a table of the main metrics: the last value, the mean of the last, their course."""
    rewards = [n for n in run.courses.by_name if n.startswith("reward/") and n.endswith("/mean")]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("", "last", f"mean of {LAST}"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    table.add_column("all steps", no_wrap=True)
    for name in (*SHOWN[:2], *rewards[:MOST_REWARDS], *SHOWN[2:]):
        course = run.courses.by_name.get(name)
        if course is not None and len(course):
            last, mean = number(course.values[-1]), number(course.mean_of_last(LAST))
            well = _is_well(name, course)
            table.add_row(
                plain(name), Text(last, style="" if well else "bold red"), Text(mean),
                Text(sparkline(course.values, blocks), style="cyan"),
            )  # fmt: skip
    return table


def _is_well(name: str, course: Course) -> bool:
    """Say whether the mean of the last values lies where that of a run that goes well does."""
    bounds = healthy(name, course)
    if bounds is None or len(course) < bounds.start:
        return True
    mean = course.mean_of_last(LAST)
    low, high = bounds.low, bounds.high
    # a deviation may come near 0, not at it; so may the share of responses that end
    return (low is None or mean > low) and (high is None or mean <= high)


def sparkline(values: Sequence[float], blocks: str) -> str:
    """Return a course as a line of blocks, each for the mean of a stretch."""
    count = min(len(values), WIDTH)
    stretches = [
        values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)
    ]
    means = [sum(part) / len(part) for part in stretches]
    low, high = min(means), max(means)
    if high == low:
        return blocks[0] * count
    top = len(blocks) - 1
    return "".join(blocks[round((mean - low) / (high - low) * top)] for mean in means)


def evaluations(run: Watched) -> list[Text]:
    """Return a line with the first and the last evaluation; none where there is none."""
    ends = [
        e for e in run.evaluations[:1] + run.evaluations[1:][-1:] if e.get("reward") is not None
    ]
    parts = []
    for one in ends:
        error = one.get("standard_error")
        spread = "" if error is None else f" ± {number(error)}"
        parts.append(f"{number(one['reward'])}{spread} at step {one['step']}")
    return [Text("\nevaluated reward  " + ", ".join(parts))] if parts else []


def events(run: Watched) -> list[Text]:
    """Return a line for each of the last events."""
    found = []
    for event in run.events:
        level = cut(event.get("level", ""), 20)
        line = f"step {event['step']}  {level}  {cut(event.get('text', ''), LONGEST_TEXT)}"
        text = plain(line)
        text.stylize("" if level in ("INFO", "DEBUG") else "yellow")
        found.append(text)
    return [Text(), *found] if found else []


def sample(run: Watched) -> list[Text]:
    """Return a sample of the newest step; nothing where there is none."""
    if run.sample is None:
        return []
    score = as_number(run.sample.get("score"))
    words = f"\na sample of step {run.sample['step']}"
    if score is not None:
        words += f", score {number(score)}"
    prompt, completion = (
        plain(cut(text_of(run.sample.get(name)), LONGEST_TEXT)) for name in ("prompt", "completion")
    )
    prompt.stylize("dim")
    return [Text(words), prompt, completion]
