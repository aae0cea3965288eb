"""A whole update on tensors without values: whatever would wait for a device raises there."""

from __future__ import annotations

import pytest
import torch

from ppo_fast.ops import gae, kl_estimate, linear_logprobs, ppo_loss, value_loss, whiten
from ppo_fast.ops.stats import PPO_STATS, VALUE_STATS, merge_stats


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_an_update_never_looks_at_a_value(aggregation):
    def meta(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    b, t, d, v = 3, 5, 8, 41
    hidden, weight = meta(b, t, d).requires_grad_(), meta(v, d).requires_grad_()
    values = meta(b, t).requires_grad_()
    labels, mask = meta(b, t, dtype=torch.int64), meta(b, t, dtype=torch.bool)
    old, ref = meta(b, t), meta(b, t)
    rewards = meta(b, t) - 0.05 * kl_estimate(old, ref, mask=mask)
    advantages, returns = gae(rewards, values.detach(), mask=mask, gamma=1.0, lam=0.95)
    policy = linear_logprobs(hidden, weight, labels, mask=mask, temperature=0.7, softcap=30.0)
    loss, metrics = ppo_loss(
        policy.logprobs,
        old_logprobs=old,
        advantages=whiten(advantages, mask=mask),
        mask=mask,
        entropy=policy.entropy,
        ref_logprobs=ref,
        dual_clip=3.0,
        kl_coef=0.1,
        entropy_coef=0.01,
        aggregation=aggregation,
        normalizer=mask.sum(),
    )
    critic_loss, value_stats = value_loss(
        values, old_values=values.detach(), returns=returns, mask=mask, clip=0.2
    )
    (loss + 0.5 * critic_loss).backward()
    assert all(x.grad.shape == x.shape for x in (hidden, weight, values))
    assert merge_stats(PPO_STATS, [metrics, metrics]).device.type == "meta"
    assert merge_stats(VALUE_STATS, [value_stats, value_stats]).device.type == "meta"
    with pytest.raises(RuntimeError):  # what a look at a value does on this device
        loss.item()
