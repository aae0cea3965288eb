"""Masked whitening: mean 0 and variance 1 over the valid tokens."""

from ppo_fast.ops.whiten.api import whiten

__all__ = ["whiten"]
