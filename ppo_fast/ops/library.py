"""Every torch.library schema and fake kernel, in one place.

The schemas carry no autograd: an op that has a gradient wraps them in a torch.autograd.Function in
its api.py. ``define`` + ``impl`` is used since ``torch.library.custom_op`` costs three times as
much a call. Launchers, and with them the compiled extension, are imported at an op's first call.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("ppo_fast", "DEF")

_library.define(
    "gae_cpp(Tensor rewards, Tensor values, Tensor? mask, Tensor? dones, "
    "Tensor bootstrap_value, Tensor lam, float gamma) -> (Tensor advantages, Tensor returns)"
)
gae_cpp = torch.ops.ppo_fast.gae_cpp.default


@torch.library.impl(_library, "gae_cpp", "CPU")
def _gae_cpp(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap_value: Tensor,
    lam: Tensor,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    from ppo_fast.ops.gae.cpp import gae

    return gae(rewards, values, mask, dones, bootstrap_value, lam, gamma)


@torch.library.register_fake(gae_cpp, lib=_library)
def _gae_cpp_fake(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap_value: Tensor,
    lam: Tensor,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)
