"""Which implementation runs: by device, by name, from the environment. gae stands for every op."""

from __future__ import annotations

import pytest
import torch

from ppo_fast.ops.backends import dispatch, library
from ppo_fast.ops.gae import api, gae

STEP = torch.ones(2, 3)


def broken(*_):
    raise AssertionError("the other implementation was used")


def test_auto_is_cpp_on_the_cpu(monkeypatch):
    monkeypatch.setattr(api.reference, "gae", broken)
    gae(STEP, STEP, gamma=0.9, lam=0.9)


def test_auto_falls_back_without_the_extension(monkeypatch):
    monkeypatch.setattr(dispatch, "missing", lambda impl: "it is gone")
    monkeypatch.setitem(library.gae, "cpp", broken)
    gae(STEP, STEP, gamma=0.9, lam=0.9)


def test_explicit_impl_never_falls_back(monkeypatch):
    kwargs = {"gamma": 0.9, "lam": 0.9}
    with pytest.raises(RuntimeError, match="triton"):
        gae(STEP, STEP, impl="triton", **kwargs)
    with pytest.raises(RuntimeError, match="meta"):
        gae(STEP.to("meta"), STEP.to("meta"), impl="cpp", **kwargs)
    monkeypatch.setattr(dispatch, "missing", lambda impl: "it is gone")
    with pytest.raises(RuntimeError, match="it is gone"):
        gae(STEP, STEP, impl="cpp", **kwargs)


def test_impl_from_the_environment(monkeypatch):
    kwargs = {"gamma": 0.9, "lam": 0.9}
    monkeypatch.setenv("PPO_FAST_IMPL", "nonsense")
    with pytest.raises(ValueError, match="PPO_FAST_IMPL=nonsense"):
        gae(STEP, STEP, **kwargs)
    gae(STEP, STEP, impl="cpp", **kwargs)
    monkeypatch.setenv("PPO_FAST_IMPL", "reference")
    with monkeypatch.context() as patch:
        patch.setitem(library.gae, "cpp", broken)
        gae(STEP, STEP, **kwargs)
    monkeypatch.setenv("PPO_FAST_IMPL", "cpp")
    with monkeypatch.context() as patch:
        patch.setattr(api.reference, "gae", broken)
        gae(STEP, STEP, **kwargs)
    with pytest.raises(RuntimeError, match=r"PPO_FAST_IMPL=cpp.*meta"):
        gae(STEP.to("meta"), STEP.to("meta"), **kwargs)
