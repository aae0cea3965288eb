"""How each of accelerate's trackers starts a run, goes on with one, and shows a table of texts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True)
class TrackedRun:
    """A run, as trackers are told of it.

    project: what runs are grouped by.
    name: of this run; None: the tracker makes one up.
    folder: where local files go.
    identity: what the tracker called this run when it started; None: it starts now.
    steps: steps of PPO done.
    """

    project: str
    name: str | None
    folder: Path
    identity: str | None
    steps: int


class Table(NamedTuple):
    """A table of samples: names of columns, and rows of texts and numbers."""

    columns: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True)
class Kind:
    """How to call one of accelerate's trackers, where they differ.

    arguments: keyword arguments of the tracker's class for a run; empty: the project alone.
    identity: reads from a started tracker what ``TrackedRun.identity`` is.
    table: shows a table: (tracker, name, table, step); None: the tracker shows none.
    fail: finishes a run that ends with an error; None: as any other.
    rewrites: whether steps that a resumed run repeats take the place of those logged before.
    settings_once: whether settings cannot be changed when a run goes on.
    plain_names: whether names of metrics are letters, digits, spaces and ``_-./`` alone.
    """

    arguments: Callable[[TrackedRun], dict[str, Any]] = lambda run: {}
    identity: Callable[[Any], str | None] = lambda tracker: None
    table: Callable[[Any, str, Table, int], None] | None = None
    fail: Callable[[Any], None] | None = None
    rewrites: bool = False
    settings_once: bool = False
    plain_names: bool = False

    def named(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics that are finite, under names that the tracker takes."""
        numbers = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        if not self.plain_names:
            return numbers
        return {re.sub(r"[^\w\-./ ]", "_", name): value for name, value in numbers.items()}


def _tensorboard(run: TrackedRun) -> dict[str, Any]:
    # what an earlier process wrote from purge_step on is not shown any more
    purge = run.steps + 1 if run.steps else 0
    return {"run_name": "tensorboard", "logging_dir": run.folder, "purge_step": purge}


def _tensorboard_table(tracker: Any, name: str, table: Table, step: int) -> None:
    tracker.tracker.add_text(name, as_markdown(table), global_step=step)
    tracker.tracker.flush()


def _wandb(run: TrackedRun) -> dict[str, Any]:
    resume = {} if run.identity is None else {"id": run.identity, "resume": "allow"}
    return {"run_name": run.project, "name": run.name, "dir": str(run.folder)} | resume


def log_table(tracker: Any, name: str, table: Table, step: int) -> None:
    """Show a table by the method that some of accelerate's trackers have."""
    tracker.log_table(name, columns=table.columns, data=table.rows, step=step)


def _trackio(run: TrackedRun) -> dict[str, Any]:
    resume = {"name": run.name} if run.identity is None else {"name": run.identity}
    return {"run_name": run.project, "resume": "never" if run.identity is None else "must"} | resume


def _trackio_table(tracker: Any, name: str, table: Table, step: int) -> None:
    frame = import_module("pandas").DataFrame(table.rows, columns=table.columns)
    tracker.log({name: import_module("trackio").Table(dataframe=frame)}, step=step)


def _mlflow(run: TrackedRun) -> dict[str, Any]:
    return {"experiment_name": run.project, "run_name": run.name, "run_id": run.identity}


def _mlflow_table(tracker: Any, name: str, table: Table, step: int) -> None:
    columns = {c: [row[i] for row in table.rows] for i, c in enumerate(table.columns)}
    import_module("mlflow").log_table(columns, artifact_file=f"{name}/step_{step}.json")


def _mlflow_fail(tracker: Any) -> None:
    import_module("mlflow").end_run("FAILED")


def _comet(run: TrackedRun) -> dict[str, Any]:
    return {"run_name": run.project} | (
        {} if run.identity is None else {"experiment_key": run.identity}
    )


def _comet_table(tracker: Any, name: str, table: Table, step: int) -> None:
    file = f"{name.replace('/', '_')}_step_{step}.csv"
    tracker.tracker.log_table(file, tabular_data=table.rows, headers=table.columns)


def _clearml(run: TrackedRun) -> dict[str, Any]:
    new = {"reuse_last_task_id": False}
    again = {"continue_last_task": run.identity}
    named = {"task_name": run.name} if run.name else {}
    return (
        {"run_name": run.project, "project_name": run.project}
        | named
        | (new if run.identity is None else again)
    )


def _dvclive(run: TrackedRun) -> dict[str, Any]:
    return {"dir": str(run.folder / "dvclive"), "resume": run.identity is not None}


def _swanlab(run: TrackedRun) -> dict[str, Any]:
    resume = {} if run.identity is None else {"id": run.identity, "resume": "allow"}
    where = {"logdir": str(run.folder / "swanlab")}
    return {"run_name": run.project, "experiment_name": run.name} | where | resume


def _aim(run: TrackedRun) -> dict[str, Any]:
    hash_ = {} if run.identity is None else {"run_hash": run.identity}
    return {"run_name": run.name or run.project, "logging_dir": str(run.folder)} | hash_


KINDS = {
    "tensorboard": Kind(
        _tensorboard,
        lambda tracker: "tensorboard",
        _tensorboard_table,
        rewrites=True,
        settings_once=True,
    ),
    "wandb": Kind(
        _wandb,
        lambda tracker: tracker.tracker.id,
        log_table,
        fail=lambda tracker: tracker.tracker.finish(exit_code=1),
    ),
    "trackio": Kind(_trackio, lambda tracker: tracker.tracker.name, _trackio_table),
    "mlflow": Kind(
        _mlflow,
        lambda tracker: tracker.tracker.info.run_id,
        _mlflow_table,
        fail=_mlflow_fail,
        settings_once=True,
        plain_names=True,
    ),
    "comet_ml": Kind(_comet, lambda tracker: tracker.tracker.get_key(), _comet_table),
    "clearml": Kind(_clearml, lambda tracker: tracker.tracker.id, log_table),
    "dvclive": Kind(_dvclive, lambda tracker: "dvclive"),
    "swanlab": Kind(_swanlab, lambda tracker: tracker.tracker.id, plain_names=True),
    "aim": Kind(_aim, lambda tracker: tracker.tracker.hash),
}


def as_markdown(table: Table) -> str:
    """Return a table in Markdown; texts are shown as they are, whatever they contain."""
    lines = [table.columns, ["---"] * len(table.columns)]
    cells = [[_escaped(x) for x in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [*lines, *cells])


def _escaped(value: Any) -> str:
    """Return a value as the text of a cell; Markdown and HTML have no meaning in it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    marks = re.sub(r"[!-/:-@\[-`{-~]", lambda found: f"&#{ord(found[0])};", str(value))
    return re.sub(r"\r\n|\r|\n", "<br>", marks)


def sample_table(
    prompts: Sequence[str],
    completions: Sequence[str],
    scores: Sequence[float],
    rewards: Mapping[str, Sequence[float]],
    count: int,
) -> Table:
    """Return a table of the first ``count`` sequences; each reward is a column if there are two."""
    parts = rewards if len(rewards) > 1 else {}
    rows = zip(prompts, completions, scores, *parts.values(), strict=True)
    columns = ["prompt", "completion", "score", *parts]
    return Table(columns, [list(row) for row in islice(rows, count)])
