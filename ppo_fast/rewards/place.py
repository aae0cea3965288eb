"""Put reward models on their device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ppo_fast.models.setup import disable_dropout


def place_reward(
    reward: Any, device: torch.device, reward_device: torch.device | str | None
) -> None:
    """Switch a reward model's dropout off, and move it to its device.

    Args:
        reward: a module, or an object with ``to(device)``, which is called; functions stay.
        device: of the trainer. A module on the CPU is moved there; one elsewhere stays where it is.
        reward_device: another device for rewards; None: the above.

    Raises:
        ValueError: torch knows no such device, or has none of this kind.
    """
    try:
        wanted = None if reward_device is None else torch.device(reward_device)
        if isinstance(reward, nn.Module):
            disable_dropout(reward)
            reward.eval()
            placed = {tensor.device.type for tensor in [*reward.parameters(), *reward.buffers()]}
            if "meta" in placed:
                raise ValueError("reward_model: lies on meta, and has no weights; load them")
            if wanted is not None or placed <= {"cpu"}:
                reward.to(wanted or device)
        elif callable(getattr(reward, "to", None)):
            reward.to(wanted or device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it has CUDA
        line = str(error).splitlines()[0]
        raise ValueError(f"reward_device: got {str(reward_device or device)!r} ({line})") from error
