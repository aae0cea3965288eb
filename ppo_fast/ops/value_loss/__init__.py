"""The (clipped) squared error of the value model."""

from ppo_fast.ops.value_loss.api import ValueLoss, value_loss

__all__ = ["ValueLoss", "value_loss"]
