"""PPOConfig: every setting of the algorithm, with the reason for its default."""

from ppo_fast.config.settings import (
    Aggregation,
    Critic,
    Importance,
    PPOConfig,
    warn_of_discount,
)

__all__ = ["Aggregation", "Critic", "Importance", "PPOConfig", "warn_of_discount"]
