from __future__ import annotations

import os
import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import settings

# No deadline: the machine's other work would decide it. The same examples in every run: a failure
# in CI is a failure here.
settings.register_profile("ppo_fast", deadline=None, derandomize=True)
settings.load_profile("ppo_fast")
THREADS = torch.get_num_threads()


def pytest_addoption(parser):
    parser.addoption(
        "--triton",
        action="store_true",
        help="run the tests of the Triton kernels alone: on the GPU, or in Triton's interpreter",
    )


def pytest_configure(config):
    if not config.getoption("--triton"):
        return
    os.environ["PPO_FAST_TEST_TRITON"] = "1"  # read by ops/runnable.py
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    else:
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported


def pytest_ignore_collect(collection_path, config):
    if collection_path.name == "interpreter" and not config.getoption("--triton"):
        return True
    return None


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--triton"):
        return

    def of_triton(item):
        parameters = getattr(item, "callspec", None)
        given = parameters is not None and parameters.params.get("impl") == "triton"
        return given or "interpreter" in item.path.parts

    config.hook.pytest_deselected(items=[item for item in items if not of_triton(item)])
    items[:] = [item for item in items if of_triton(item)]


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads(request):
    """Run kernels on several threads, and models on one: tiny models gain nothing from more threads
    and, beside other processes, wait for threads that are not running."""
    torch.set_num_threads(THREADS if "ops" in request.path.parts else 1)


@pytest.fixture(autouse=True)
def _path_of_modules(monkeypatch):
    """Loading a reward adds its folder to the path; other tests must not import from there."""
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(autouse=True)
def _no_impl_from_outside(monkeypatch):
    monkeypatch.delenv("PPO_FAST_IMPL", raising=False)
