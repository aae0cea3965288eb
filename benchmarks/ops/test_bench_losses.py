"""ppo_loss and value_loss with all their terms, forward and backward: [64, 512]."""

import eager
import pytest
import torch
from sides import ROWS, STEPS

from ppo_fast.ops import ppo_loss, value_loss


@pytest.mark.parametrize("option", ["", ", importance weights", ", the ratio of sequences"])
def test_losses(turns, option):
    mask = torch.arange(STEPS) < torch.randint(1, STEPS + 1, (ROWS, 1))
    logprobs = -torch.rand(ROWS, STEPS) * 5
    values = torch.randn(ROWS, STEPS)
    near = [x + 0.2 * torch.randn(ROWS, STEPS) for x in (logprobs, logprobs, values)]
    old_logprobs, ref_logprobs, old_values = near
    advantages, returns = torch.randn(2, ROWS, STEPS)
    entropy = torch.rand(ROWS, STEPS)
    inputs = [x.requires_grad_() for x in (logprobs, entropy, values)]

    weights = (old_logprobs - ref_logprobs).detach().exp().clamp(max=2)

    def ours(impl):
        policy = ppo_loss(
            logprobs,
            old_logprobs=old_logprobs,
            advantages=advantages,
            mask=mask,
            entropy=entropy,
            ref_logprobs=ref_logprobs,
            dual_clip=3.0,
            kl_coef=0.05,
            entropy_coef=0.01,
            weights=weights if "weights" in option else None,
            ratio="sequence" if "sequences" in option else "token",
            impl=impl,
        )
        value = value_loss(
            values, old_values=old_values, returns=returns, mask=mask, clip=0.2, impl=impl
        )
        return policy.loss + value.loss, policy.metrics, value.metrics

    def by_hand():
        return (
            eager.losses(
                logprobs,
                entropy,
                values,
                old_logprobs=old_logprobs,
                ref_logprobs=ref_logprobs,
                advantages=advantages,
                old_values=old_values,
                returns=returns,
                mask=mask,
            ),
        )

    def with_gradient(losses):
        def side():
            loss, *metrics = losses()
            return *torch.autograd.grad(loss, inputs), *metrics

        return side

    compiled, by_hand_compiled = torch.compile(ours), torch.compile(by_hand)
    losses = {
        "ppo_fast": lambda: ours("cpp"),
        "eager with all metrics: the reference": lambda: ours("reference"),
        "torch.compile of the reference": lambda: compiled("reference"),
    }
    if not option:
        losses["eager without metrics"] = by_hand
        losses["torch.compile of that without metrics"] = by_hand_compiled
    sides = {name: with_gradient(loss) for name, loss in losses.items()}
    turns(f"ppo_loss + value_loss, forward and backward{option}, 64 x 512", sides, rounds=100)
