"""Tiles of the vocabulary that are small enough for tests of linear_logprobs to take several."""

from __future__ import annotations

import importlib

import pytest
from runnable import TRITON

TILED = importlib.import_module(
    f"ppo_fast.ops.linear_logprobs.{'triton_tiles' if TRITON else 'cpp'}"
)
BUDGETS = [0, 4096, 2**28]  # everything recomputed, some tiles kept, all kept


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """Make tiles a few dozen columns wide: small vocabularies have several, the last narrower."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TILED, "_TILE_BYTES", 1 if TRITON else 1000)
        patch.setattr(TILED, "_MIN_COLUMNS", 17)
        if TRITON:
            patch.setattr(TILED, "_COLUMN_STEP", 16)
        yield
