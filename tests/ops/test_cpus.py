"""How many threads the C++ kernels get, and which instruction set they use."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from ppo_fast.ops import _C
from ppo_fast.ops.backends import cpus


@pytest.fixture
def usable(monkeypatch):
    """Return usable(allowed=..., quota=...), which calls usable_cpus under these limits."""

    def usable(allowed: int, quota: float) -> int:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
        monkeypatch.setattr(cpus, "cgroup_quotas", lambda: iter([math.inf, quota]))
        return cpus.usable_cpus.__wrapped__()

    return usable


@pytest.mark.parametrize(
    ("allowed", "quota", "expected"),
    [(8, math.inf, 8), (8, 2.0, 2), (8, 2.5, 3), (2, 5.0, 2), (8, 0.1, 1)],
)
def test_affinity_and_quota_bound_the_threads(usable, allowed, quota, expected):
    assert usable(allowed, quota) == expected


@pytest.mark.parametrize(("torchs", "expected"), [(1, 1), (3, 3), (4, 3)])
def test_threads_are_at_most_those_of_torch(monkeypatch, torchs, expected):
    monkeypatch.setattr(torch, "get_num_threads", lambda: torchs)
    monkeypatch.setattr(cpus, "usable_cpus", lambda: 3)
    assert cpus.num_threads() == expected


def quotas(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return list(cpus.cgroup_quotas(root))


def test_quotas_of_cgroups_version_2(tmp_path):
    """The group has no quota, its parent has one, and the root of the mount is the container's."""
    files = {
        "proc/self/cgroup": "0::/user.slice/run.scope\n",
        "sys/fs/cgroup/user.slice/run.scope/cpu.max": "max 100000\n",
        "sys/fs/cgroup/user.slice/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/cpu.max": "400000 100000\n",
        "sys/fs/cpu.max": "1 100000\n",  # outside the mount
    }
    assert quotas(tmp_path, files) == [1.5, 4.0]


def test_quotas_of_cgroups_version_1(tmp_path):
    """In a container, the path is that on the host, and the mount's root is the group itself."""
    files = {
        "proc/self/cgroup": "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n3:cpuset:/docker/ab\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "25000\n",
    }
    assert quotas(tmp_path, files) == [2.0]
    files["sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "-1\n"
    assert quotas(tmp_path, files) == []


def test_no_cgroups(tmp_path):
    assert quotas(tmp_path, {}) == []


# The names in /proc/cpuinfo of what each set needs. The system lists none whose registers it does
# not save.
AVX2 = {"avx2", "fma"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
NEEDS = {"avx512_bf16": AVX512 | {"avx512_bf16"}, "avx512": AVX512, "avx2": AVX2, "baseline": set()}


def test_the_instruction_sets_are_those_of_the_processor():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), None)
    if flags is None:
        pytest.skip("no list of this processor's flags")
    expected = [name for name, needed in NEEDS.items() if needed <= flags]
    assert _C.instruction_sets() == expected
    assert _C.instruction_set() == expected[0]
