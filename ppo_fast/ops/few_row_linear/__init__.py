"""The linear layer for a few rows, as in one decoding step."""

from ppo_fast.ops.few_row_linear.api import few_row_linear

__all__ = ["few_row_linear"]
