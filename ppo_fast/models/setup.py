"""What PPOTrainer makes of the models that it is given."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

from ppo_fast.config import PPOConfig
from ppo_fast.critics.critic import Critic, HeadCritic, ModelCritic, TopCritic, TopValue, ValueHead
from ppo_fast.models.adapters import body_of, without_new_adapters
from ppo_fast.models.heads import (
    RewardModel,
    ValueModel,
    disable_dropout,
    enable_gradient_checkpointing,
)
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.precision import HALF, hold_products_in, hold_trained_weights
from ppo_fast.models.trunk import Split, freeze_trunk, share_trunk


def which_critic(config: PPOConfig, value_model: Any) -> str:
    """The critic asked for, with None resolved; TypeError or ValueError if that does not fit."""
    critic = config.critic or ("baseline" if value_model is None else "model")
    if critic == "model" and not isinstance(value_model, nn.Module):
        raise TypeError(
            f"value_model: got {type(value_model).__name__}, but critic='model' needs a "
            "torch.nn.Module; pass one, or config=PPOConfig(critic='head' or 'baseline')"
        )
    if value_model is not None and not any(p.requires_grad for p in value_model.parameters()):
        raise ValueError("value_model: it has no weights to train; unfreeze some or pass None")
    if critic != "model" and value_model is not None:
        raise ValueError(
            f"value_model: got {type(value_model).__name__}, but critic={critic!r} uses none; "
            "pass None, or config=PPOConfig(critic='model')"
        )
    return critic


def prepare(
    policy_model: nn.Module, value_model: nn.Module | None, reward_model: Any, config: PPOConfig
) -> None:
    """Float32 computation, no dropout, a frozen trunk, gradient checkpointing: what is asked
    for."""
    for name, model in (("policy_model", policy_model), ("value_model", value_model)):
        if model is None:
            continue
        if config.compute_dtype is None and any(p.dtype in HALF for p in model.parameters()):
            warnings.warn(
                f"{name}: its half-precision weights become float32; at the learning rates of "
                "RL most updates of a half-precision weight are lost to rounding. "
                "compute_dtype='bfloat16' leaves those that are not trained as they are",
                stacklevel=3,
            )
            model.float()
        disable_dropout(model)
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(model, name)
    if isinstance(reward_model, nn.Module):
        disable_dropout(reward_model)
        reward_model.eval()
    if config.num_layers_unfrozen is not None:
        freeze_trunk(policy_model, config.num_layers_unfrozen)


def make_reference(policy_model: nn.Module, config: PPOConfig) -> nn.Module:
    """What the KL is measured to, frozen: a copy of what is trained, or the model without its
    adapters where these are new."""
    reference = without_new_adapters(_copy_of_what_is_trained(policy_model))
    if config.torch_dtype is not None:
        hold_products_in(config.torch_dtype, reference, without=policy_model)
    return reference.requires_grad_(False).eval()


def hold_weights(policy_model: nn.Module, value_model: nn.Module | None, config: PPOConfig) -> None:
    """What is trained, in the dtype that the config asks for; without compute_dtype ``prepare`` has
    seen to it."""
    if config.compute_dtype is None:
        return
    for model in (policy_model, value_model):
        if model is not None:
            hold_trained_weights(model, config.weights_dtype)


def make_critic(
    critic: str,
    policy: LanguageModel,
    value_model: nn.Module | None,
    config: PPOConfig,
    device: torch.device,
) -> Critic | None:
    """The value function; None for a baseline. ValueError where the policy shows no states."""
    if critic == "baseline":
        return None
    if critic == "model":
        assert value_model is not None
        return ModelCritic(
            value_model,
            budget=config.forward_batch_tokens,
            compute_dtype=config.torch_dtype,
            split=put_on_trunk(value_model, policy),
        )
    if policy.body is None:
        raise ValueError(
            f"config.critic={critic!r}: the hidden states of {type(policy.model).__name__} cannot "
            "be told from its logits; pass a value_model or use critic='baseline'"
        )
    hidden_size = policy.text_config.hidden_size
    if critic == "head":
        return HeadCritic(ValueHead(hidden_size).to(device))
    assert config.num_layers_unfrozen is not None
    top = TopValue(_copy_of_what_is_trained(policy.body), hidden_size).to(device)
    return TopCritic(top, config.num_layers_unfrozen, compute_dtype=config.torch_dtype)


def put_on_trunk(model: Any, policy: LanguageModel) -> Split | None:
    """The lower layers of a RewardModel, or of a ValueModel that does not train them, are the
    policy's trunk from now on, if they hold the same weights. Where it is split; None: it is not
    put there."""
    if policy.split is None or type(model) not in (RewardModel, ValueModel):
        return None
    body, k = body_of(model.base_model), policy.split.num_layers_unfrozen
    shared = share_trunk(body, policy.split.body, k, only_frozen=type(model) is ValueModel)
    return Split(body, k) if shared else None


def check_shared_weights(
    policy_model: nn.Module,
    value_model: nn.Module | None,
    reward_model: Any,
    critic: Critic | None,
) -> None:
    """Raise ValueError where training one model would change another, or nothing is trained."""
    trained = {id(p) for p in policy_model.parameters() if p.requires_grad}
    if not trained:
        raise ValueError("policy_model: all its weights are frozen, there is nothing to train")
    for name, model in (("value_model", value_model), ("reward_model", reward_model)):
        if isinstance(model, nn.Module) and any(id(p) in trained for p in model.parameters()):
            raise ValueError(
                f"{name}: shares trained weights with policy_model; give it a copy "
                "(copy.deepcopy) or, for values from the policy's own states, use "
                "value_model=None with config=PPOConfig(critic='head')"
            )
    if critic is None or not isinstance(reward_model, nn.Module):
        return
    valued = {id(p) for p in critic.module.parameters() if p.requires_grad}
    if any(id(p) in valued for p in reward_model.parameters()):
        raise ValueError(
            "reward_model: shares trained weights with value_model, so that scores would move "
            "as it trains; give one of them a copy (copy.deepcopy)"
        )


def _copy_of_what_is_trained(module: nn.Module) -> nn.Module:
    """What is not trained is the same for both: the copy shares it."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters() if not p.requires_grad})
