"""Trackers: reports a run to TensorBoard, Weights & Biases, Trackio, MLflow and others."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ppo_fast.checks import is_whole
from ppo_fast.data.evaluated import Evaluated
from ppo_fast.data.step import Step
from ppo_fast.disk.files import written
from ppo_fast.runs.callbacks import Callback
from ppo_fast.trackers.classes import known_trackers, one_process
from ppo_fast.trackers.kinds import Table, TrackedRun, sample_table
from ppo_fast.trackers.names import NAMES, MetricNames, in_names_of_trl
from ppo_fast.trackers.running import RunningTracker, as_settings

logger = logging.getLogger(__name__)

FILE = "trackers.json"
SAMPLES_EVERY = 10  # steps


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
        run_name: of this run; None: the folder's name (of one called "checkpoints", its parent's),
            or without a folder the time.
        folder: where trackers.json and local files go, TensorBoard's into its "tensorboard"; None:
            runs/<run_name>.
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
        self._startable = known_trackers(report_to)
        self._project, self._samples, self._names = project, samples, metric_names
        self._run_name = run_name or _name_of(folder)
        self._folder = Path("runs", self._run_name) if folder is None else Path(folder)
        self._running: list[RunningTracker] = []
        self._settings: Mapping[str, Any] = {}
        self._before: dict[str, dict[str, Any]] = {}
        self._release: Callable[[], None] | None = None

    def on_start(self, settings: Mapping[str, Any], steps: int) -> None:
        """Start the trackers.

        Raises:
            RuntimeError: one does not start.
        """
        if not self._startable:
            return
        self._settings = settings
        self._before = self._read() if steps else {}
        self._release = one_process()
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            for name, startable in self._startable.items():
                known = self._before.get(name, {})
                identity = known.get("identity")
                run = TrackedRun(self._project, self._run_name, self._folder, identity, steps)
                self._running.append(RunningTracker(name, startable, run, known))
        except BaseException:
            self.on_end(None)
            raise
        for one in self._running:
            one.store(as_settings(settings))
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
            one.finish(failed=result is None)
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
        path = self._folder / FILE
        if not path.exists():
            return {}
        try:
            found = json.loads(path.read_text("utf-8"))
            return {name: dict(known) for name, known in found.items()}
        except (ValueError, TypeError, AttributeError, OSError) as error:
            logger.warning("%s cannot be read (%s); the trackers begin new runs", path, error)
            return {}

    def _write(self) -> None:
        # what other trackers have of this run is kept
        state = self._before | {one.name: one.state() for one in self._running}
        try:
            with written(self._folder / FILE) as file:
                file.write(json.dumps(state, indent=2).encode())
        except OSError as error:
            logger.warning("%s cannot be written (%s)", self._folder / FILE, error)


def _name_of(folder: Path | str | None) -> str:
    """Return a name for a run in ``folder``."""
    if folder is None:
        return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    path = Path(folder).resolve()
    return path.parent.name if path.name == "checkpoints" else path.name
