"""Trackers: what they are given, resumed runs, failures; TensorBoard's files, and a stand-in."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import markdown
import pytest
import torch
from accelerate.state import PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ppo_fast.data.evaluated import Evaluated
from ppo_fast.data.rollout import Rollout
from ppo_fast.data.scores import Scores
from ppo_fast.data.step import Step
from ppo_fast.trackers import report_to
from ppo_fast.trackers.kinds import KINDS, Table, TrackedRun, as_markdown
from ppo_fast.trackers.report_to import Trackers
from ppo_fast.trackers.running import as_settings

SETTINGS = {"learning_rate": 1e-5, "betas": (0.9, 0.95), "kl_target": None, "out": Path("a/b")}


class StandIn(GeneralTracker):
    """A tracker that keeps what it is given; ``fails``: numbers of its calls that raise."""

    name, requires_logging_directory = "stand-in", False

    def __init__(self, *fails: int):
        super().__init__()
        self.calls, self.fails, self.tables = [], fails, []

    @property
    def tracker(self):
        return self

    def _call(self, *call):
        self.calls.append(call)
        if len(self.calls) in self.fails:
            raise ConnectionError("the network is gone")

    def start(self):
        self.calls.append(("start",))

    def store_init_configuration(self, values):
        self._call("settings", values)

    def log(self, values, step=None, **kwargs):
        self._call("log", step, values)

    def log_table(self, name, columns=None, data=None, dataframe=None, step=None, **kwargs):
        self.tables.append((name, step, columns, data))

    def finish(self):
        self._call("finish")

    def steps(self, name="mean_reward"):
        return [call[1] for call in self.calls if call[0] == "log" and name in call[2]]


@pytest.fixture(autouse=True)
def _no_state_is_left():
    """A run that a test breaks off leaves accelerate's state, which dies with a process."""
    yield
    PartialState._reset_state()


def rollout(rows=3):
    made = Rollout.from_tokens([[1, 2]] * rows, [[3, 4, 5]] * rows)
    return replace(made, prompts=["a | *b* <i>"] * rows, completions=["c\nd"] * rows)


def step(number, **metrics):
    metrics = {"mean_reward": float(number), "policy_loss": math.nan} | metrics
    rewards = {"one": torch.tensor([1.0, 2.0, 3.0]), "two": torch.zeros(3)}
    return Step(number, metrics, rollout(), torch.tensor([1.0, 2.0, 3.0]), rewards)


def evaluated(number):
    scores = Scores(torch.tensor([[1.0, 1.0], [2.0, 0.0], [3.0, 0.0]]))
    return Evaluated(number, {"reward": number / 2}, rollout(), scores)


def run(trackers, first, last, *, end=True):
    """Report the steps after ``first`` up to ``last``, and evaluations of every other one."""
    trackers.on_start(SETTINGS, first)
    if first == 0:
        trackers.on_evaluate(evaluated(0))
    for number in range(first + 1, last + 1):
        trackers.on_step(step(number))
        if number % 2 == 0:
            trackers.on_evaluate(evaluated(number))
    if end:
        trackers.on_end({})


def events(folder):
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return found


def test_what_a_tracker_is_given(tmp_path):
    tracker = StandIn()
    run(Trackers(tracker, folder=tmp_path, samples=2), 0, 2)
    assert tracker.calls == [
        ("start",),
        ("settings", {"learning_rate": 1e-5, "betas": "(0.9, 0.95)", "kl_target": "None",
                      "out": str(Path("a/b"))}),
        ("log", 0, {"eval/reward": 0.0}),
        ("log", 1, {"mean_reward": 1.0}),
        ("log", 2, {"mean_reward": 2.0}),
        ("log", 2, {"eval/reward": 1.0}),
        ("finish",),
    ]  # fmt: skip
    columns, texts = ["prompt", "completion", "score"], ["a | *b* <i>", "c\nd"]
    row = [columns, [[*texts, 2.0], [*texts, 2.0]]]
    both = [[*columns, "one", "two"], [[*texts, 1.0, 1.0, 0.0], [*texts, 2.0, 2.0, 0.0]]]
    assert [list(table) for table in tracker.tables] == [
        ["eval/samples", 0, *row], ["samples", 1, *both], ["eval/samples", 2, *row]
    ]  # fmt: skip


def test_no_tables_where_none_are_asked_for(tmp_path):
    tracker = StandIn()
    run(Trackers([tracker], folder=tmp_path, samples=0), 0, 12)
    assert not tracker.tables
    tracker = StandIn()
    run(Trackers([tracker], folder=tmp_path), 0, 21)
    assert [at for name, at, *_ in tracker.tables if name == "samples"] == [1, 10, 20]


def test_a_resumed_run_logs_no_step_twice(tmp_path, caplog):
    """The first process ends after step 5, its newest checkpoint is that of step 3."""
    run(Trackers(StandIn(), folder=tmp_path), 0, 5, end=False)
    again = StandIn()
    run(Trackers(again, folder=tmp_path), 3, 8)
    assert again.steps() == [6, 7, 8]
    assert again.steps("eval/reward") == [6, 8]
    assert "stand-in has the steps up to 5 already" in caplog.text
    new = StandIn()
    run(Trackers(new, folder=tmp_path), 0, 2)  # not resumed: another run
    assert new.steps() == [1, 2]


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path):
    """Steps after the checkpoint take the place of those of the process that was killed."""
    first = Trackers("tensorboard", folder=tmp_path)
    run(first, 0, 5, end=False)
    first.on_step(step(6, mean_reward=-1.0))
    first.on_end(None)
    run(Trackers("tensorboard", folder=tmp_path), 4, 7)
    found = events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("mean_reward")] == [
        (n, float(n)) for n in range(1, 8)
    ]
    assert [e.step for e in found.Scalars("eval/reward")] == [0, 2, 4, 6]
    assert "policy_loss" not in found.Tags()["scalars"]
    [text] = found.Tensors("samples/text_summary")
    assert text.step == 1
    folders = [path for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()]
    assert len(list((tmp_path / "tensorboard").glob("*/hparams.yml"))) == 1
    assert len(folders) == 2  # of the hyperparameters, which the resumed run has already


def test_texts_are_no_markdown():
    """TensorBoard renders them by this package, with these extensions."""
    table = Table(["completion", "score"], [["a|b `c` <b>\r\n# _d_ &amp; [x](http://y)", 0.123456]])
    html = markdown.markdown(
        as_markdown(table), extensions=["tables", "fenced_code"]
    )  # TensorBoard's
    assert html.count("<td>") == 2
    assert "<td>0.1235</td>" in html
    assert not any(tag in html for tag in ("<b>", "<code>", "<em>", "<a", "<h1>"))
    assert html.count("<br>") == 1


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, caplog):
    tracker, sound = StandIn(4), StandIn()
    with caplog.at_level(logging.WARNING):
        run(Trackers([tracker, sound], folder=tmp_path), 0, 4)
    assert tracker.steps() == sound.steps() == [1, 2, 3, 4]
    warnings = [r.getMessage() for r in caplog.records]
    assert len(warnings) == 1
    assert "stand-in failed, and the run goes on (ConnectionError: the network" in warnings[0]


def test_failures_that_are_not_in_a_row_leave_no_tracker_out(tmp_path, caplog):
    tracker = StandIn(4, 5, 7, 8, 10, 11)  # of the calls that log step 1 and others
    run(Trackers(tracker, folder=tmp_path), 0, 9)
    assert tracker.steps() == list(range(1, 10))
    assert len(caplog.records) == 1


def test_what_another_tracker_has_is_kept(tmp_path):
    """A run resumed with other trackers does not forget the first one's."""

    class Other(StandIn):
        name = "other"

    run(Trackers(StandIn(), folder=tmp_path), 0, 4)
    run(Trackers(Other(), folder=tmp_path), 4, 6)
    again = StandIn()
    run(Trackers(again, folder=tmp_path), 2, 6)
    assert again.steps() == [5, 6]


def test_one_reward_is_no_column(tmp_path):
    tracker, made = StandIn(), step(1)
    trackers = Trackers(tracker, folder=tmp_path)
    trackers.on_start(SETTINGS, 0)
    trackers.on_step(replace(made, rewards={"one": made.rewards["one"]}))
    [(_, _, columns, _)] = tracker.tables
    assert columns == ["prompt", "completion", "score"]


def test_a_tracker_that_fails_again_and_again_is_left_out(tmp_path, caplog):
    tracker, sound = StandIn(*range(4, 99)), StandIn()
    with caplog.at_level(logging.WARNING):
        run(Trackers([tracker, sound], folder=tmp_path), 0, 8)
    assert sound.steps() == list(range(1, 9))
    assert tracker.steps() == [1, 2]  # and an evaluation
    assert [at for name, at, *_ in tracker.tables] == [0, 1, 2]
    assert tracker.calls[-1] == ("finish",)
    assert len(caplog.records) == 2
    assert "3 times in a row" in caplog.text
    state = json.loads((tmp_path / "trackers.json").read_text())
    assert state["stand-in"]["step"] == -1
    assert state["stand-in 2"]["step"] == 8


def test_one_that_does_not_start_is_an_error(tmp_path):
    class Broken(StandIn):
        name = "broken"

        def start(self):
            raise PermissionError("no API key")

    sound = StandIn()
    with pytest.raises(RuntimeError, match="report_to: broken does not start: no API key"):
        Trackers([sound, Broken()], folder=tmp_path).on_start(SETTINGS, 0)
    assert sound.calls[-1] == ("finish",)
    assert not PartialState._shared_state


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ("tensorbord", ValueError, "got 'tensorbord'.*did you mean 'tensorboard'"),
        (["tensorboard", "x"], ValueError, "got 'x', expected some of aim"),
        ([3], TypeError, "got int, expected names, or objects"),
        (StandIn, TypeError, "got type"),
    ],
)
def test_bad_names_are_errors_at_once(asked, error, message):
    with pytest.raises(error, match=message):
        Trackers(asked)


def test_a_package_that_is_missing_is_an_error_at_once(monkeypatch):
    from accelerate import tracking

    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ModuleNotFoundError, match=r"wandb is not installed: pip install wandb"):
        Trackers(["wandb"])
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ppo_fast\[trackers\]'"):
        Trackers("tensorboard")
    monkeypatch.setitem(sys.modules, "accelerate.tracking", None)
    with pytest.raises(ModuleNotFoundError, match=r"accelerate.*ppo_fast\[trackers\]"):
        Trackers("tensorboard")
    run(Trackers("none"), 0, 1)
    run(Trackers(()), 0, 1)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="metric_names: got 'TRL'"):
        Trackers((), metric_names="TRL")
    with pytest.raises(ValueError, match="samples: got -1"):
        Trackers((), samples=-1)


def test_a_launchers_variables_are_no_other_processes(tmp_path, monkeypatch):
    """With these accelerate would wait for a second process at MASTER_ADDR."""
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    tracker = StandIn()
    trackers = Trackers(["tensorboard", tracker], folder=tmp_path)
    run(trackers, 0, 1, end=False)
    assert PartialState().num_processes == 1
    assert not torch.distributed.is_initialized()
    assert os.environ["WORLD_SIZE"] == "2"
    assert os.environ["LOCAL_RANK"] == "0"
    assert "NCCL_P2P_DISABLE" not in os.environ
    trackers.on_end({})
    assert not PartialState._shared_state  # an Accelerator of the user's finds what it would have
    assert events(tmp_path).Scalars("mean_reward")


def test_a_state_of_the_users_stays(tmp_path):
    PartialState()
    run(Trackers(StandIn(), folder=tmp_path), 0, 1)
    assert PartialState._shared_state


def test_a_tracker_of_accelerates_that_the_user_made(tmp_path):
    made = TensorBoardTracker("mine", str(tmp_path))
    run(Trackers([made], folder=tmp_path / "run"), 0, 2)
    found = EventAccumulator(str(tmp_path / "mine"))
    found.Reload()
    assert [e.step for e in found.Scalars("mean_reward")] == [1, 2]
    assert found.Tensors("samples/text_summary")


def test_every_tracker_of_accelerates_is_known():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(LOGGER_TYPE_TO_CLASS) <= KINDS.keys()


def test_runs_go_on_by_what_trackers_called_them():
    new = TrackedRun("p", "n", Path("f"), None, 0)
    old = replace(new, identity="x1", steps=4)
    keys = {"wandb": "id", "trackio": "name", "mlflow": "run_id", "comet_ml": "experiment_key",
            "clearml": "continue_last_task", "swanlab": "id", "aim": "run_hash"}  # fmt: skip
    for name, key in keys.items():
        assert KINDS[name].arguments(old)[key] == "x1", name
        assert KINDS[name].arguments(new).get(key) != "x1", name
    assert KINDS["tensorboard"].arguments(old)["purge_step"] == 5
    assert KINDS["dvclive"].arguments(old)["resume"] is True


def test_names_that_mlflow_refuses():
    named = KINDS["mlflow"].named({"reward/f(x)/mean": 1.0, "time/rollout": math.inf})
    assert named == {"reward/f_x_/mean": 1.0}


def test_a_file_that_is_broken_begins_new_runs(tmp_path, caplog):
    (tmp_path / "trackers.json").write_text("[1")
    tracker = StandIn()
    run(Trackers(tracker, folder=tmp_path), 3, 4)
    assert tracker.steps() == [4]
    assert "cannot be read" in caplog.text


def test_settings_are_numbers_booleans_or_texts():
    given = {"a": True, "b": 2, "c": math.inf, "d": ["x"], "e": "y"}
    assert as_settings(given) == {"a": True, "b": 2, "c": "inf", "d": "['x']", "e": "y"}


def test_names_of_runs(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        report_to, "TrackedRun", lambda *run: made.append(run[1]) or TrackedRun(*run)
    )
    monkeypatch.chdir(tmp_path)
    for options in ({"folder": "a/checkpoints"}, {"folder": "b"}, {"folder": "b", "run_name": "c"}):
        run(Trackers(StandIn(), **options), 0, 1)
    assert made == ["a", "b", "c"]
    run(Trackers("tensorboard"), 0, 1)
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name == made[-1]
    assert events(folder).Scalars("mean_reward")
