"""Find the trackers of accelerate's that a user names, and start them without an Accelerator."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any, NamedTuple

from ppo_fast.trackers.kinds import KINDS, Kind, TrackedRun, log_table

INSTALL = "pip install 'ppo_fast[trackers]'"
# By these accelerate sees that a process is one of many, and waits for the others.
OF_LAUNCHERS = (
    "LOCAL_RANK",
    "WORLD_SIZE",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
)
# Without these, accelerate refuses several consumer GPUs, which it is not to use here.
OF_NCCL = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}


class Startable(NamedTuple):
    """A tracker that can be started: what makes it of the arguments that its kind gives."""

    make: Callable[[dict[str, Any], TrackedRun], Any]
    kind: Kind


def known_trackers(report_to: Sequence[Any] | str) -> dict[str, Startable]:
    """Return the trackers of ``report_to`` by name.

    Raises:
        TypeError, ValueError: ``report_to`` has something else.
        ModuleNotFoundError: accelerate, or a tracker's package, is not installed.
    """
    one_alone = isinstance(report_to, str) or not isinstance(report_to, Sequence)
    asked = [report_to] if one_alone else list(report_to)
    asked = [one for one in asked if one is not None and one != "none"]
    if not asked:
        return {}
    tracking = _tracking()
    installed = [str(name) for name in tracking.get_available_trackers()]
    if "all" in asked:
        asked = [one for one in asked if not isinstance(one, str)] + installed
    found: dict[str, Startable] = {}
    for one in asked:
        if isinstance(one, tracking.GeneralTracker):
            found[_free(str(one.name), found)] = _given(one, tracking)
        elif isinstance(one, str):
            _check_name(one, tracking, installed)
            kind = KINDS.get(one, Kind())
            found[one] = Startable(partial(_of_class, tracking.LOGGER_TYPE_TO_CLASS[one]), kind)
        else:
            raise TypeError(
                f"report_to: got {type(one).__name__}, expected names, or objects of classes that "
                "derive from accelerate.tracking.GeneralTracker"
            )
    return found


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """Return a name, with a number if it is taken."""
    names = (name if n == 1 else f"{name} {n}" for n in count(1))
    return next(one for one in names if one not in taken)


def _tracking() -> Any:
    try:
        return importlib.import_module("accelerate.tracking")
    except ImportError as error:
        raise ModuleNotFoundError(
            f"report_to needs accelerate, which is not installed: {INSTALL}", name="accelerate"
        ) from error


def _check_name(name: str, tracking: Any, installed: Sequence[str]) -> None:
    """Raise an error unless accelerate has a tracker of this name, and its package is installed."""
    known = tracking.LOGGER_TYPE_TO_CLASS
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        names = ", ".join(sorted(known))
        version = importlib.import_module("accelerate").__version__
        raise ValueError(
            f"report_to: got {name!r}, expected some of {names} (of accelerate {version}), 'all' "
            f"or 'none'{hint}"
        )
    if name not in installed and name in {str(kind) for kind in tracking.LoggerType}:
        how = INSTALL if name == "tensorboard" else f"pip install {name}"
        raise ModuleNotFoundError(f"report_to: {name} is not installed: {how}", name=name)


def _of_class(cls: Any, arguments: dict[str, Any], run: TrackedRun) -> Any:
    if arguments:
        return _started(cls(**arguments))
    # a class that a user registered with accelerate
    directory = [str(run.folder)] if cls.requires_logging_directory else []
    return _started(cls(run.project, *directory))


def _given(tracker: Any, tracking: Any) -> Startable:
    """Return a tracker that a user made."""
    if type(tracker) is tracking.LOGGER_TYPE_TO_CLASS.get(tracker.name):
        kind = KINDS.get(tracker.name, Kind())
    else:
        kind = Kind(table=log_table if hasattr(tracker, "log_table") else None)
    return Startable(lambda arguments, run: _started(tracker), replace(kind, rewrites=False))


def _started(tracker: Any) -> Any:
    if hasattr(tracker, "start"):  # accelerate 1.8 brought it; before, making a tracker starts it
        tracker.start()
    return tracker


def one_process() -> Callable[[], None]:
    """Tell accelerate that this process is alone, which its trackers ask; returns what undoes it.

    Where a launcher's variables are set, accelerate would wait for other processes. A state that
    was there before stays.
    """
    state = importlib.import_module("accelerate.state").PartialState
    if state._shared_state:
        return lambda: None
    with _without_launchers():
        state()
    return state._reset_state


@contextmanager
def _without_launchers() -> Iterator[None]:
    """Within the block, hide the launchers' variables."""
    before = dict(os.environ)
    try:
        for name in OF_LAUNCHERS:
            os.environ.pop(name, None)
        os.environ.update(OF_NCCL)
        yield
    finally:
        for name in {*OF_LAUNCHERS, *OF_NCCL}:
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]
