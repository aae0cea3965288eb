"""Freed memory serves later tensors."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# AddressSanitizer has a malloc of its own.
with_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or "asan" in os.environ.get("LD_PRELOAD", ""),
    reason="mallopt is of glibc",
)

# 160 MB, freed and allocated again: 40,960 pages of 4 KB.
SCRIPT = """
import resource, torch
from ppo_fast.ops.backends.heap import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**20) for _ in range(40)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(keep_freed_memory())
faults()
print(faults())
"""


def run(**variables):
    own = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    own.pop("GLIBC_TUNABLES", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=own | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@with_glibc
def test_freed_memory_is_used_again_without_new_pages():
    kept, faults = run()
    assert kept
    assert faults < 4_000


@with_glibc
@pytest.mark.parametrize(
    "variable", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}]
)
def test_what_the_environment_asks_for_stays(variable):
    assert not run(**variable)[0]
