"""Generalised advantage estimation."""

from ppo_fast.ops.gae.api import GAE, gae

__all__ = ["GAE", "gae"]
