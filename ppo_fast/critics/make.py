"""Choose the critic of a trainer, and make it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ppo_fast.config import Critic as CriticName
from ppo_fast.config import PPOConfig
from ppo_fast.critics.baselines import BASELINES, Baseline
from ppo_fast.critics.critic import Critic, HeadCritic, ModelCritic, TopCritic
from ppo_fast.models.copies import copy_of_what_is_trained
from ppo_fast.models.heads import TopValue, ValueHead
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.setup import freeze_matching, put_on_trunk


def critic_name(config: PPOConfig, value_model: Any) -> CriticName:
    """Return ``config.critic``; where that is None, "model" with a value model, else "baseline"."""
    return config.critic or ("baseline" if value_model is None else "model")


def which_critic(config: PPOConfig, value_model: Any) -> CriticName:
    """Return the name of the critic asked for.

    Raises:
        TypeError, ValueError: it does not fit ``value_model``.
    """
    critic = critic_name(config, value_model)
    if critic == "model" and not isinstance(value_model, nn.Module):
        raise TypeError(
            f"value_model: got {type(value_model).__name__}, but critic='model' needs a "
            "torch.nn.Module; pass one, or config=PPOConfig(critic='head' or 'baseline')"
        )
    if value_model is not None and not any(p.requires_grad for p in value_model.parameters()):
        raise ValueError("value_model: has no weights to train; unfreeze some or pass None")
    for name in ("value_epochs", "critic_warmup_steps", "value_frozen"):
        if critic in BASELINES and getattr(config, name):
            raise ValueError(
                f"{name}: got {getattr(config, name)}, but critic={critic!r} has no value function "
                "to train; use critic='head' or a value_model"
            )
    if critic != "model" and value_model is not None:
        raise ValueError(
            f"value_model: got {type(value_model).__name__}, but critic={critic!r} uses none; "
            "pass None, or config=PPOConfig(critic='model')"
        )
    return critic


def make_critic(
    critic: CriticName,
    policy: LanguageModel,
    value_model: nn.Module | None,
    config: PPOConfig,
    device: torch.device,
) -> Critic:
    """Make the critic of this name.

    Raises:
        ValueError: it needs the policy's states, which cannot be told from its logits.
    """
    if critic in BASELINES:
        return Baseline(critic, config.gamma)
    if critic == "model":
        assert value_model is not None
        return ModelCritic(
            value_model,
            max_tokens=config.forward_batch_tokens,
            compute_dtype=config.torch_dtype,
            split=put_on_trunk(value_model, policy),
            padding_free=config.padding_free,
        )
    if policy.body is None:
        raise ValueError(
            f"config.critic={critic!r}: {type(policy.model).__name__} does not give access to its "
            "hidden states; pass a value_model or use critic='baseline'"
        )
    hidden_size = policy.states_size
    if critic == "head":
        return HeadCritic(ValueHead(hidden_size).to(device))
    assert config.num_layers_unfrozen is not None
    body = copy_of_what_is_trained(policy.body, config.torch_dtype)
    top = TopValue(body, hidden_size).to(device)
    freeze_matching(top, config.value_frozen, "value_frozen")
    return TopCritic(
        top,
        config.num_layers_unfrozen,
        compute_dtype=config.torch_dtype,
        padding_free=config.padding_free,
    )
