"""Trackers: reports a run to TensorBoard, Weights & Biases, Trackio, MLflow and others."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ppo_fast.checks import is_whole
from ppo_fast.data.evaluated import Evaluated
from ppo_fast.data.step import Step
from ppo_fast.runs.callbacks import Callback
from ppo_fast.runs.files import written
from ppo_fast.runs.metric_names import NAMES, MetricNames, in_names_of_trl
from ppo_fast.runs.tracker_classes import known_trackers, one_process
from ppo_fast.runs.tracker_kinds import KINDS, Kind, Table, TrackedRun, sample_table

logger = logging.getLogger(__name__)

FILE = "trackers.json"
SAMPLES_EVERY = 10  # steps
MOST_FAILURES = 3  # in a row


class Trackers(Callback):
    """Reports a run's settings, metrics, evaluations and samples to trackers of accelerate's.

    A resumed run goes on in the same run of each tracker: ``trackers.json`` in ``folder`` says
    which. Steps that a resumed run repeats take the place of the former ones in TensorBoard; the
    other trackers cannot do so, and get the steps alone that they do not have. A tracker that fails
    amid a run is warned of, and left out after three failures in a row; the run goes on.

    Args:
        report_to: names: "tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "clearml",
            "dvclive", "swanlab", "aim" or one that was registered with accelerate; "all": all that
            are installed; "none": none. Or objects of classes derived from accelerate's
            ``GeneralTracker``.
        project: what the trackers group runs by.
        run_name: of this run; None: the folder's name, or the date.
        folder: where trackers.json and local files go, "tensorboard" among them; None: into the
            current directory, and a resumed run begins new ones.
        metric_names: "trl": as TRL's PPOTrainer names them, where the meaning is the same.
        samples: sequences in a table of samples, at evaluations and every 10th step, for
            trackers that show tables; 0: no tables.

    Raises:
        ValueError: an unknown name.
        ModuleNotFoundError: accelerate, or a tracker's package, is not installed.
    """

    def __init__(
        self,
        report_to: Sequence[Any] | str,
        *,
        project: str = "ppo_fast",
        run_name: str | None = None,
        folder: Path | str | None = None,
        metric_names: MetricNames = "ppo_fast",
        samples: int = 8,
    ) -> None:
        if metric_names not in NAMES:
            raise ValueError(f"metric_names: got {metric_names!r}, expected one of {NAMES}")
        if not is_whole(samples) or samples < 0:
            raise ValueError(f"samples: got {samples!r}, expected a whole number of at least 0")
        self._classes = known_trackers(report_to)
        self._project, self._samples, self._names = project, samples, metric_names
        self._folder = None if folder is None else Path(folder)
        default = None if self._folder is None else self._folder.resolve().name
        self._run_name = run_name or default or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        self._running: list[_Running] = []
        self._settings: Mapping[str, Any] = {}
        self._release: Callable[[], None] | None = None

    def on_start(self, settings: Mapping[str, Any], steps: int) -> None:
        """Start the trackers.

        Raises:
            RuntimeError: one does not start.
        """
        if not self._classes:
            return
        self._settings = settings
        before = self._read() if steps else {}
        self._release = one_process()
        folder = Path() if self._folder is None else self._folder
        folder.mkdir(parents=True, exist_ok=True)
        for name, make in self._classes.items():
            known = before.get(name, {})
            run = TrackedRun(self._project, self._run_name, folder, known.get("identity"), steps)
            one = _Running(name, make, run, known)
            self._running.append(one)
            if run.identity is None or not one.kind.settings_once:
                one.attempt(lambda t: t.store_init_configuration(as_settings(settings)))
        self._write()

    def on_step(self, step: Step) -> None:
        """Report a step's metrics, and every 10th step's samples."""
        metrics = dict(step.metrics)
        if self._names == "trl":
            rows = len(step.rollout.tokens)
            metrics = in_names_of_trl(
                metrics, step=step.number, sequences=rows, settings=self._settings
            )
        table = None
        if self._samples and (step.number == 1 or step.number % SAMPLES_EVERY == 0):
            rewards = {name: part.tolist() for name, part in step.rewards.items()}
            texts = step.rollout.prompts, step.rollout.completions
            table = sample_table(*texts, step.scores.tolist(), rewards, self._samples)
        self._log("step", step.number, metrics, "samples", table)

    def on_evaluate(self, evaluated: Evaluated) -> None:
        """Report an evaluation's metrics, as eval/<name>, and its samples."""
        metrics = {f"eval/{name}": value for name, value in evaluated.metrics.items()}
        table = None
        if self._samples:
            scores, texts = evaluated.scores, evaluated.rollout
            total = scores.total.sum(1) if scores.total.dim() == 2 else scores.total
            rewards = {name: part.tolist() for name, part in scores.parts.items()}
            table = sample_table(
                texts.prompts, texts.completions, total.tolist(), rewards, self._samples
            )
        self._log("evaluation", evaluated.step, metrics, "eval/samples", table)

    def on_end(self, result: Mapping[str, Any] | None) -> None:
        """Finish the trackers."""
        for one in self._running:
            fail = one.kind.fail if result is None else None
            one.attempt(fail or (lambda t: t.finish()))
        self._running = []
        if self._release is not None:
            self._release()
            self._release = None

    def _log(
        self, what: str, step: int, metrics: dict[str, float], name: str, table: Table | None
    ) -> None:
        for one in self._running:
            one.log(what, step, metrics, name, table)
        if self._running:
            self._write()

    def _read(self) -> dict[str, Any]:
        path = None if self._folder is None else self._folder / FILE
        if path is None or not path.exists():
            return {}
        try:
            found = json.loads(path.read_text("utf-8"))
            return found if isinstance(found, dict) else {}
        except ValueError as error:
            logger.warning("%s cannot be read (%s); the trackers begin new runs", path, error)
            return {}

    def _write(self) -> None:
        if self._folder is None:
            return
        state = {one.name: one.state() for one in self._running}
        try:
            with written(self._folder / FILE) as file:
                file.write(json.dumps(state, indent=2).encode())
        except OSError as error:
            logger.warning("%s cannot be written (%s)", self._folder / FILE, error)


class _Running:
    """A started tracker; its failures, after the start, are logged and not raised.

    Args:
        name: of the tracker.
        make: makes the tracker of the arguments that its Kind gives.
        run: the run.
        known: what ``state`` returned in the process before; empty: a new run.

    Raises:
        RuntimeError: it does not start.
    """

    def __init__(
        self, name: str, make: Callable[..., Any], run: TrackedRun, known: Mapping[str, Any]
    ) -> None:
        self.name, self._failures, self._said = name, 0, False
        self.kind = KINDS.get(name, Kind(lambda run: {}))
        self._before = {what: known.get(what, -1) for what in ("step", "evaluation")}
        if self.kind.rewrites:
            self._before = {what: min(n, run.steps) for what, n in self._before.items()}
        elif self._before["step"] > run.steps:
            logger.warning(
                "%s has the steps up to %d already, and gets those after them alone",
                name,
                self._before["step"],
            )
        self._logged = dict(self._before)
        try:
            self._tracker: Any = make(run, self.kind)
            self._identity = self.kind.identity(self._tracker)
        except Exception as error:  # of any type: it is the tracker's
            raise RuntimeError(f"report_to: {name} does not start: {error}") from error

    def log(
        self, what: str, step: int, metrics: Mapping[str, float], name: str, table: Table | None
    ) -> None:
        """Log numbers, those that are finite, and a table, unless it was done before."""
        if (step <= self._logged[what] and what == "step") or step < 0:
            return
        self.attempt(lambda t: t.log(self.kind.named(metrics), step=step))
        show = self.kind.table
        if table is not None and show is not None:
            self.attempt(lambda t: show(t, name, table, step))
        self._logged[what] = step

    def attempt(self, call: Callable[[Any], Any]) -> None:
        """Call a method of the tracker; if it fails, warn, and leave it out after some failures."""
        if self._failures >= MOST_FAILURES:
            return
        try:
            call(self._tracker)
            self._failures = 0
        except Exception as error:  # of any type: no tracker ends a run
            self._failures += 1
            if not self._said:
                self._said = True
                logger.warning(
                    "report_to: %s failed, and the run goes on (%s: %s)",
                    self.name,
                    type(error).__name__,
                    error,
                )
            if self._failures == MOST_FAILURES:
                logger.warning(
                    "report_to: %s failed %d times in a row (now %s: %s); it gets no more of this "
                    "run until it is resumed",
                    self.name,
                    MOST_FAILURES,
                    type(error).__name__,
                    error,
                )

    def state(self) -> dict[str, Any]:
        """Return what the next process needs to go on."""
        return {"identity": self._identity, **self._logged}


def as_settings(settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Return settings as every tracker takes them: all but numbers and booleans as texts."""

    def plain(value: Any) -> bool | int | float | str:
        if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
            return value
        return str(value)

    return {str(name): plain(value) for name, value in settings.items()}
