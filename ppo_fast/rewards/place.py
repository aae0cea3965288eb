"""Put reward models on their device."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from ppo_fast.models.setup import disable_dropout
from ppo_fast.rewards.encoding import FORMAT_ATTRIBUTE

logger = logging.getLogger(__name__)


def place_reward(
    reward: Any, device: torch.device, reward_device: torch.device | str | None
) -> None:
    """Switch a reward model's dropout off, and move it to its device.

    A warning is logged of a module that was trained on texts in another format than "policy": it is
    given the policy's tokens, which end with EOS where a response was not cut.

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
            _warn_of_format(reward)
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


def _warn_of_format(module: nn.Module) -> None:
    noted = getattr(getattr(module, "config", None), FORMAT_ATTRIBUTE, None)
    if noted not in (None, "policy"):
        logger.warning(
            "reward_model: %s was trained with format=%r, and is given the policy's tokens, with "
            "EOS where a response ends; pass ClassifierReward(reward_model, its_tokenizer), or "
            'train it with format="policy"',
            type(module).__name__,
            noted,
        )
