"""Make the parts of a trainer from what it is given, checked before any model runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ppo_fast.config import PPOConfig
from ppo_fast.critics.critic import Critic
from ppo_fast.critics.make import make_critic, which_critic
from ppo_fast.learning.learner import Learner
from ppo_fast.models import setup
from ppo_fast.models.checks import (
    check_policy,
    check_tokenizer,
    check_vocabulary,
    resolve_device,
    to_device,
)
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.precision import WeightCopies
from ppo_fast.ops.backends.heap import keep_freed_memory
from ppo_fast.rewards.load import with_loaded
from ppo_fast.rewards.place import place_reward
from ppo_fast.rewards.scorer import Scorer, named_rewards, without_wrapper
from ppo_fast.rollout import Engine
from ppo_fast.rollout.agreement import check_agreement
from ppo_fast.rollout.local_engine import kept_bytes, make_local_engine
from ppo_fast.rollout.sampler import MakeEnvironment, Sampler, check_environment
from ppo_fast.rollout.texts import Texts


class Parts(NamedTuple):
    """Parts of a trainer; ``PPO`` says what each is."""

    device: torch.device
    policy: LanguageModel
    reference: LanguageModel
    critic: Critic
    texts: Texts
    sampler: Sampler
    scorer: Scorer
    learner: Learner


def make_parts(
    policy_model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    reward: Any,
    *,
    value_model: nn.Module | None,
    reference_model: nn.Module | None,
    device: torch.device | str | None,
    reward_device: torch.device | str | None,
    config: PPOConfig,
    engine: Engine | None,
    environment: MakeEnvironment | None,
) -> Parts:
    """Make the parts of a trainer; the arguments are those of ``PPO``.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    check_policy(policy_model)
    check_tokenizer(tokenizer)
    reward = with_loaded(reward)
    named_rewards(reward, config.reward_weights)
    check_environment(environment, engine)
    if engine is not None and config.kv_cache_dtype is not None:
        raise ValueError(
            f"kv_cache_dtype: got {config.kv_cache_dtype!r} with a {type(engine).__name__}, which "
            "has a cache of its own; use None"
        )
    check_rollout_weights(config, engine)
    name = which_critic(config, value_model)
    device = resolve_device(device, policy_model)
    models: dict[str, Any] = {"policy_model": policy_model, "value_model": value_model}
    for model_name, model in models.items():
        check_vocabulary(model, model_name, tokenizer)
    place_rewards(reward, tokenizer, device, reward_device)
    models["reference_model"] = reference_model
    for model_name, model in models.items():
        to_device(model, model_name, device)
    policy = setup.make_policy(policy_model, value_model, None, config)
    reference = setup.make_reference(policy, reference_model, config, value_model)
    critic: Critic = make_critic(name, policy, value_model, config, device)
    setup.check_shared_weights(policy_model, value_model, None, critic.module)
    scorer = make_scorer(
        reward,
        policy=policy,
        reference=reference,
        critic=critic,
        value_model=value_model,
        tokenizer=tokenizer,
        config=config,
    )
    texts = Texts(
        policy_model,
        tokenizer,
        skip_special_tokens=config.skip_special_tokens,
        long_prompts=config.long_prompts,
        max_prompt_length=config.max_prompt_length,
    )
    if device.type == "cpu":
        keep_freed_memory()
    int8 = config.rollout_weights == "int8"
    copied = engine is not None or check_agreement(policy, tokenizer.pad_token_id, int8=int8)
    copies = WeightCopies(config.torch_dtype, kept_bytes(policy, config), autocast=not copied)
    engine = engine or make_local_engine(
        policy,
        tokenizer,
        config,
        keep_states=critic.reads_states,
        whole_trunk=scorer.reads_trunk,
    )
    return Parts(
        device,
        policy,
        reference,
        critic,
        texts,
        Sampler(engine, texts, copies, environment),
        scorer,
        Learner(policy, critic, config),
    )


def check_rollout_weights(config: PPOConfig, engine: Engine | None) -> None:
    """Raise ValueError where a given engine does not decode with the weights that are asked for."""
    if engine is None:
        return
    kind, asked = type(engine).__name__, config.rollout_weights
    if asked is not None and not getattr(engine, "int8", False):
        raise ValueError(
            f"rollout_weights={asked!r}: {kind} decodes with weights of its own; it needs "
            "engine=None, or use rollout_weights=None"
        )
    if asked is None and getattr(engine, "int8", False):
        raise ValueError(
            f"rollout_weights: got None with a {kind} that decodes with weights in int8, whose "
            "log-probs are not the policy's; use rollout_weights='int8'"
        )


def place_rewards(
    reward: Any,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    reward_device: torch.device | str | None,
) -> None:
    """Check that rewards know the policy's tokens, and move them to their device."""
    for one in map(without_wrapper, named_rewards(reward).values()):
        check_vocabulary(one, "reward_model", tokenizer)
        place_reward(one, device, reward_device)


def placed_scorer(
    reward: Any, *, device: torch.device, reward_device: torch.device | str | None, **parts: Any
) -> Scorer:
    """Load rewards, move them to their device, and make their scorer.

    Args:
        reward: as ``PPO`` takes it.
        device, reward_device: of the trainer.
        **parts: as ``make_scorer``'s.
    """
    reward = with_loaded(reward)
    named_rewards(reward, parts["config"].reward_weights)
    place_rewards(reward, parts["tokenizer"], device, reward_device)
    return make_scorer(reward, **parts)


def make_scorer(
    reward: Any,
    *,
    policy: LanguageModel,
    reference: LanguageModel,
    critic: Critic,
    tokenizer: PreTrainedTokenizerBase,
    config: PPOConfig,
    value_model: nn.Module | None = None,
) -> Scorer:
    """Make the scorer of rewards that are in their place.

    Raises:
        TypeError, ValueError: one is no reward, or shares weights that are trained.
    """
    scorer = Scorer(
        reward,
        policy,
        config.forward_batch_tokens,
        config.reward_weights,
        reference=reference,
        tokenizer=tokenizer,
    )
    for one in scorer.modules.values():
        setup.check_shared_weights(policy.model, value_model, one, critic.module)
    if "reward" in config.offload:
        scorer.rest(policy.model, critic.module)
    return scorer
