"""Attention of one decoding step, over the keys and values of a cache."""

from ppo_fast.ops.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
