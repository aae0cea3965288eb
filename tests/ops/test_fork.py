"""A forked process computes, with one thread and a warning, where torch alone would hang."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys, warnings
import torch
from ppo_fast.ops import gae, linear_logprobs

x, hidden = torch.randn(64, 4096), torch.randn(600, 900)
labels = torch.zeros(600, dtype=torch.int64)

def work():
    logprobs = linear_logprobs(hidden, hidden, labels).logprobs
    return gae(x, x, gamma=1.0, lam=0.9).advantages, logprobs

parent = work()
hidden @ hidden.T
if os.fork():
    _, status = os.wait()
    sys.exit(os.waitstatus_to_exitcode(status))
signal.alarm(20)  # ends the process if it hangs
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first, second = work(), work()
found = [w for w in caught if "was forked" in str(w.message)]
near = all(torch.allclose(a, b, atol=1e-4) for a, b in zip(parent, first))
os._exit(0 if near and len(found) == 1 and torch.get_num_threads() == 1 else 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_process():
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
