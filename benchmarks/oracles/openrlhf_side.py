"""OpenRLHF's losses and its experience maker, imported without DeepSpeed, Ray and vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from oracles.stubs import stubbed
from torch import Tensor

with stubbed("deepspeed", "ray", "flash_attn", "pylatexenc", "vllm", "aiohttp", "torchdata"):
    from openrlhf.models import utils
    from openrlhf.models.loss import PolicyLoss, ValueLoss
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
    from openrlhf.trainer.ppo_utils.kl_controller import AdaptiveKLController
    from openrlhf.trainer.ppo_utils.length_penalty import apply_overlong_penalty

__all__ = [
    "AdaptiveKLController",
    "PolicyLoss",
    "RemoteExperienceMaker",
    "ValueLoss",
    "apply_overlong_penalty",
    "utils",
]


def experience(
    estimator: str,
    scores: Tensor,
    kl: Tensor,
    mask: Tensor,
    *,
    samples_per_prompt: int = 1,
    values: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    kl_coef: float = 0.0,
    clip: tuple[float, float] | None = None,
) -> Any:
    """Return OpenRLHF's Experience, with advantages and returns, of scores [B]."""
    advantage = SimpleNamespace(estimator=estimator, gamma=gamma, lambd=lam, no_std_norm=False)
    maker = RemoteExperienceMaker.__new__(RemoteExperienceMaker)
    maker.args = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        rollout=SimpleNamespace(n_samples_per_prompt=samples_per_prompt),
        reward=SimpleNamespace(clip_range=clip),
    )
    maker.strategy = SimpleNamespace(args=maker.args)
    maker.advantage_estimator, maker.kl_ctl = estimator, SimpleNamespace(value=kl_coef)
    batch = SimpleNamespace(
        rewards=scores.clone(),
        index=list(range(len(scores))),
        info={},
        kl=kl,
        action_mask=mask,
        values=values,
    )
    return maker.compute_advantages_and_returns([batch])[0]


def overlong_penalty(lengths: Tensor, longest: int, buffer: int, penalty: float) -> Tensor:
    """Return OpenRLHF's penalties [B] of responses' lengths, which it adds to rewards."""
    batch = SimpleNamespace(
        response_length=lengths, rewards=torch.zeros(len(lengths), dtype=torch.float32)
    )
    apply_overlong_penalty([batch], longest, buffer, penalty)
    return batch.rewards
