"""Find the trackers of accelerate's that a user names, and start them without an Accelerator."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from ppo_fast.runs.tracker_kinds import Kind, TrackedRun

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

Make = Callable[[TrackedRun, Kind], Any]


def known_trackers(report_to: Sequence[Any] | str) -> dict[str, Make]:
    """Return, by name, what makes and starts each tracker of ``report_to``.

    Raises:
        TypeError, ValueError: ``report_to`` has something else.
        ModuleNotFoundError: accelerate, or a tracker's package, is not installed.
    """
    asked = [report_to] if isinstance(report_to, str) or not _is_list(report_to) else report_to
    asked = [one for one in asked if one != "none"]
    if not asked:
        return {}
    tracking = _tracking()
    installed = [str(name) for name in tracking.get_available_trackers()]
    if "all" in asked:
        asked = [one for one in asked if not isinstance(one, str)] + installed
    found: dict[str, Make] = {}
    for one in asked:
        if isinstance(one, tracking.GeneralTracker):
            found[str(one.name)] = partial(_start_given, one)
            continue
        if not isinstance(one, str):
            raise TypeError(
                f"report_to: got {type(one).__name__}, expected names, or objects of classes that "
                "derive from accelerate.tracking.GeneralTracker"
            )
        _check_name(one, tracking, installed)
        found[one] = partial(_start_class, tracking.LOGGER_TYPE_TO_CLASS[one], one)
    return found


def _is_list(report_to: Any) -> bool:
    return isinstance(report_to, Sequence)


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


def _start_class(cls: Any, name: str, run: TrackedRun, kind: Kind) -> Any:
    arguments = kind.arguments(run)
    if arguments:
        tracker = cls(**arguments)
    else:  # of a class that a user registered
        directory = [str(run.folder)] if cls.requires_logging_directory else []
        tracker = cls(run.project, *directory)
    return _start_given(tracker, run, kind)


def _start_given(tracker: Any, run: TrackedRun, kind: Kind) -> Any:
    if hasattr(tracker, "start"):  # accelerate 1.8 brought it; before, making one starts it
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
    with _environment():
        state()
    return state._reset_state


@contextmanager
def _environment() -> Iterator[None]:
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
