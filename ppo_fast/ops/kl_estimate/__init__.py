"""Per-token estimates of the KL divergence to a reference policy."""

from ppo_fast.ops.kl_estimate.api import KLEstimator, kl_estimate

__all__ = ["KLEstimator", "kl_estimate"]
