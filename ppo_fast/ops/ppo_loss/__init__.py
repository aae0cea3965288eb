"""The policy objectives with their KL term and entropy bonus."""

from ppo_fast.ops.ppo_loss.api import Aggregation, Objective, PPOLoss, Ratio, ppo_loss

__all__ = ["Aggregation", "Objective", "PPOLoss", "Ratio", "ppo_loss"]
