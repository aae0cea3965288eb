from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

# No deadline: the machine's other work would decide it. The same examples in every run: a failure
# in CI is a failure here.
settings.register_profile("ppo_fast", deadline=None, derandomize=True)
settings.load_profile("ppo_fast")


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_impl_from_outside(monkeypatch):
    monkeypatch.delenv("PPO_FAST_IMPL", raising=False)
