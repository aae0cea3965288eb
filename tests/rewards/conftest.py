"""A rollout whose steps a test can watch."""

from __future__ import annotations

import pytest

from ppo_fast.rollout.by_slots import _Decoding


@pytest.fixture
def decoding(monkeypatch):
    """Calls ``decoding.at_step(running)`` before each step; notes whether a rollout is on."""

    class Watched:
        on = False

        def at_step(self, running):
            pass

    watched, step, rollout = Watched(), _Decoding.step, _Decoding.rollout

    def watched_step(self):
        watched.on = True
        watched.at_step(len(self.running))
        step(self)

    def watched_rollout(self):
        watched.on = False
        return rollout(self)

    monkeypatch.setattr(_Decoding, "step", watched_step)
    monkeypatch.setattr(_Decoding, "rollout", watched_rollout)
    return watched
