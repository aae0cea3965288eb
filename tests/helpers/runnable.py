"""The implementations, the device and the precision that a test process runs.

An ordinary process runs the reference and the C++ kernels on the CPU. With ``pytest --triton`` a
process runs the Triton kernels alone: on the GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import os

import pytest
import torch

from ppo_fast.ops.backends.impls import COMPILED, missing

TRITON = os.environ.get("PPO_FAST_TEST_TRITON") == "1"  # set by conftest.py
# The Triton kernels have no float64.
WIDE = torch.float32 if TRITON else torch.float64
FLOATS = [torch.float32, torch.bfloat16, torch.float16] + ([] if TRITON else [torch.float64])


def implementations(op: str) -> list:
    """Return the parameters of ``impl`` that this process runs."""
    if TRITON:
        impls = [impl for impl in COMPILED[op] if impl == "triton"]
    else:
        impls = ["reference", *(impl for impl in COMPILED[op] if impl == "cpp")]
    return [
        pytest.param(impl, marks=pytest.mark.skipif(bool(missing(impl)), reason=str(missing(impl))))
        for impl in impls
    ]


def examples(count: int) -> int:
    """Return the number of examples of a property test: fewer in the interpreter, which is slow."""
    return min(count, 15) if TRITON and not torch.cuda.is_available() else count


def generator(seed: int) -> torch.Generator:
    """Return a random generator on the default device."""
    return torch.Generator(device=torch.get_default_device()).manual_seed(seed)
