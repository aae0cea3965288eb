"""How many threads the C++ kernels use: torch's number, but no more than may run at once."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch


def num_threads() -> int:
    return min(torch.get_num_threads(), usable_cpus())


@cache
def usable_cpus() -> int:
    """The CPUs that this process may run on, or those that its cgroup's quota pays for, whichever
    are fewer. Looked up once."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        allowed = os.cpu_count() or 1
    return math.ceil(min([allowed, *cgroup_quotas()]))


def cgroup_quotas(root: Path = Path("/")) -> Iterator[float]:
    """CPUs that the quotas pay for, of this process's cgroups and of those around them."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # version 2
            mount, names = root / "sys/fs/cgroup", ["cpu.max"]
        elif "cpu" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        # In a container the mount may be that of the group itself, and `group` the whole path.
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
