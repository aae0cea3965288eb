"""The clipped policy objective with its KL term and entropy bonus."""

from ppo_fast.ops.ppo_loss.api import Aggregation, PPOLoss, ppo_loss

__all__ = ["Aggregation", "PPOLoss", "ppo_loss"]
