"""How many threads the C++ kernels use: torch's number, but no more than may run at once."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

_process = {"used": False, "forked": False}


def num_threads() -> int:
    """Return how many threads a kernel may use; warn once in a forked process."""
    _process["used"] = True
    if _process["forked"]:
        _process["forked"] = False
        warnings.warn(
            "this process was forked from one that had used torch's threads, which a fork does not "
            "copy: torch would wait for them forever. It computes with one thread; start processes "
            "with multiprocessing.get_context('spawn') to use more",
            stacklevel=2,
        )
    return min(torch.get_num_threads(), usable_cpus())


def _in_forked_process() -> None:
    """Keep torch from waiting for OpenMP threads that only the parent has."""
    if _process["used"]:
        _process["forked"] = True
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_in_forked_process)


@cache
def usable_cpus() -> int:
    """Return how many CPUs this process may use: by its affinity or its cgroup's quota, the fewer.

    Looked up once.
    """
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        allowed = os.cpu_count() or 1
    return math.ceil(min([allowed, *cgroup_quotas()]))


def cgroup_quotas(root: Path = Path("/")) -> Iterator[float]:
    """Yield the quotas, in CPUs, of this process's cgroups and of their parents."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # version 2
            mount, names = root / "sys/fs/cgroup", ["cpu.max"]
        elif "cpu" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        # In a container the mount may be the group's own folder, and `group` its path on the host.
        folder = mount / group.lstrip("/")
        for place in (folder, *folder.parents):
            match " ".join(_text(place / name) for name in names).split():
                case [quota, period] if quota not in ("max", "-1"):
                    yield int(quota) / int(period)
            if place == mount:
                break


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
