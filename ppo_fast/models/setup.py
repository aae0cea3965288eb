"""Prepare the models that a trainer is given: dtypes, dropout, trunk and reference."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ppo_fast.config import PPOConfig
from ppo_fast.models.adapters import without_new_adapters
from ppo_fast.models.checks import check_policy
from ppo_fast.models.copies import copy_of_what_is_trained
from ppo_fast.models.heads import RewardModel, ValueModel
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.offload import Resting, own_tensors
from ppo_fast.models.packed_attention import checkpoint_contexts
from ppo_fast.models.parts import body_of
from ppo_fast.models.patching import uncompiled
from ppo_fast.models.precision import (
    HALF,
    computing_in,
    hold_products_in,
    hold_trained_weights,
)
from ppo_fast.models.probe import probe_tokens, relative_difference
from ppo_fast.models.quantized import packed_weights, prepare_quantized, to_float32
from ppo_fast.models.trunk import Split, freeze_trunk, run, share_trunk
from ppo_fast.ops.linear_logprobs.api import LOGITS_BUDGET_BYTES

# Attributes with the size of the noise that routers of experts, or their input, get in train mode.
JITTERS = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")


def make_policy(
    policy_model: nn.Module, value_model: nn.Module | None, reward_model: Any, config: PPOConfig
) -> LanguageModel:
    """Prepare the models that are trained or give rewards, and return the policy."""
    prepare(policy_model, value_model, reward_model, config)
    hold_weights(policy_model, value_model, config)
    policy = _language_model(policy_model, config, config.cache_dtype)
    check_train_mode(policy, config)
    return policy


def make_reference(
    policy: LanguageModel,
    reference_model: nn.Module | None,
    config: PPOConfig,
    value_model: nn.Module | None = None,
) -> LanguageModel:
    """Return the frozen model that the KL is measured to: the one given, or a copy of the policy.

    With ``offload``, those of its weights that the others have not rest in host memory.

    Raises:
        TypeError: ``reference_model`` is no causal language model.
        ValueError: it has another vocabulary, or shares weights that are trained.
    """
    if reference_model is None:
        reference = _language_model(frozen_copy(policy.model, config), config)
    else:
        reference = _given_reference(policy, reference_model, config, value_model)
    if "reference" in config.offload:
        others = [policy.model] if value_model is None else [policy.model, value_model]
        reference.resting = Resting(own_tensors(reference.model, *others))
    return reference


def _given_reference(
    policy: LanguageModel,
    reference_model: nn.Module,
    config: PPOConfig,
    value_model: nn.Module | None,
) -> LanguageModel:
    """Check and freeze a reference that the user gave."""
    check_policy(reference_model, "reference_model")
    ours, theirs = map(_vocabulary, (policy.model, reference_model))
    if ours != theirs:
        raise ValueError(
            f"reference_model: its vocabulary has {theirs} tokens, the policy's {ours}; the KL "
            "compares probabilities of the same tokens"
        )
    for name, model in (("policy_model", policy.model), ("value_model", value_model)):
        trained = {id(p) for p in model.parameters() if p.requires_grad} if model else set()
        if any(id(p) in trained for p in reference_model.parameters()):
            raise ValueError(
                f"reference_model: shares trained weights with {name}, and would change as it "
                "trains; give it a copy (copy.deepcopy), or None: a copy of the policy"
            )
    disable_dropout(reference_model)
    prepare_quantized(reference_model, config.torch_dtype)
    return LanguageModel(
        reference_model.requires_grad_(False).eval(),
        compute_dtype=config.torch_dtype,
        padding_free=config.padding_free,
    )


def _vocabulary(model: Any) -> int:
    """Return the number of logits; a quantised head's weight has another shape."""
    head = model.get_output_embeddings()
    return getattr(head, "out_features", None) or head.weight.shape[0]


def _language_model(
    model: nn.Module, config: PPOConfig, kv_cache_dtype: torch.dtype | None = None
) -> LanguageModel:
    return LanguageModel(
        model,
        num_layers_unfrozen=config.num_layers_unfrozen,
        compute_dtype=config.torch_dtype,
        logits_budget_bytes=logits_budget_bytes(config),
        padding_free=config.padding_free,
        kv_cache_dtype=kv_cache_dtype,
    )


def logits_budget_bytes(config: PPOConfig) -> int:
    """Return how many bytes of logits linear_logprobs may keep for its backward pass."""
    return 0 if config.gradient_checkpointing else LOGITS_BUDGET_BYTES


def prepare(
    policy_model: nn.Module, value_model: nn.Module | None, reward_model: Any, config: PPOConfig
) -> None:
    """Apply the config's choices: float32, no dropout, a frozen trunk, gradient checkpointing."""
    for name, model in (("policy_model", policy_model), ("value_model", value_model)):
        if model is None:
            continue
        prepare_quantized(model, config.torch_dtype)
        packed = packed_weights(model)
        half = any(p.dtype in HALF and p not in packed for p in model.parameters())
        if config.compute_dtype is None and half:
            warnings.warn(
                f"{name}: its half-precision weights become float32; at the learning rates of "
                "RL most updates of a half-precision weight are lost to rounding. "
                "compute_dtype='bfloat16' leaves frozen weights in half precision",
                stacklevel=6,
            )
            to_float32(model)
        disable_dropout(model)
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(model, name)
    if isinstance(reward_model, nn.Module):
        disable_dropout(reward_model)
        reward_model.eval()
    if config.num_layers_unfrozen is not None:
        freeze_trunk(policy_model, config.num_layers_unfrozen)
    freeze_matching(policy_model, config.frozen, "frozen")
    if value_model is not None:
        freeze_matching(value_model, config.value_frozen, "value_frozen")


def freeze_matching(model: nn.Module, patterns: Sequence[str], setting: str) -> None:
    """Freeze the weights of ``model`` whose names match one of ``patterns``, as fnmatch reads them.

    Raises:
        ValueError: a pattern matches no weight, or no trained weight is left; it names ``setting``.
    """
    if not patterns:
        return
    weights = dict(model.named_parameters())
    for pattern in patterns:
        matching = fnmatch.filter(weights, pattern)
        if not matching:
            raise ValueError(
                f"{setting}: {pattern!r} matches no weight of {type(model).__name__}, such as "
                f"{next(iter(weights))!r}"
            )
        for name in matching:
            weights[name].requires_grad_(False)
    if not any(weight.requires_grad for weight in weights.values()):
        raise ValueError(f"{setting}: {patterns} leaves {type(model).__name__} no weight to train")


def frozen_copy(policy_model: nn.Module, config: PPOConfig) -> nn.Module:
    """Return a frozen copy of the policy.

    It is a copy of the policy that shares frozen weights, or the model without its adapters where
    these are new.
    """
    reference = without_new_adapters(copy_of_what_is_trained(policy_model, config.torch_dtype))
    if config.torch_dtype is not None:
        hold_products_in(config.torch_dtype, reference, without=policy_model)
    return reference.requires_grad_(False).eval()


def hold_weights(policy_model: nn.Module, value_model: nn.Module | None, config: PPOConfig) -> None:
    """Convert trained weights to the config's storage dtype.

    Without compute_dtype nothing is done: ``prepare`` has made them float32.
    """
    if config.compute_dtype is None:
        return
    for model in (policy_model, value_model):
        if model is not None:
            hold_trained_weights(model, config.weights_dtype)


def put_on_trunk(model: Any, policy: LanguageModel) -> Split | None:
    """Let a RewardModel or ValueModel use the policy's trunk if its own has equal weights.

    A ValueModel that trains these layers shares nothing. Returns the model's Split, or None if the
    trunk is not shared.
    """
    if policy.split is None or type(model) not in (RewardModel, ValueModel):
        return None
    body, k = body_of(model.base_model), policy.split.num_layers_unfrozen
    shared = share_trunk(body, policy.split.body, k, only_frozen=type(model) is ValueModel)
    return Split(body, k) if shared else None


def check_shared_weights(
    policy_model: nn.Module,
    value_model: nn.Module | None,
    reward_model: Any,
    critic: nn.Module,
) -> None:
    """Raise ValueError where training one model would change another, or nothing is trained."""
    trained = {id(p) for p in policy_model.parameters() if p.requires_grad}
    if not trained:
        raise ValueError("policy_model: all its weights are frozen; unfreeze those to train")
    for name, model in (("value_model", value_model), ("reward_model", reward_model)):
        if isinstance(model, nn.Module) and any(id(p) in trained for p in model.parameters()):
            raise ValueError(
                f"{name}: shares trained weights with policy_model; give it a copy "
                "(copy.deepcopy) or, for values from the policy's own states, use "
                "value_model=None with config=PPOConfig(critic='head')"
            )
    if not isinstance(reward_model, nn.Module):
        return
    valued = {id(p) for p in critic.parameters() if p.requires_grad}
    if any(id(p) in valued for p in reward_model.parameters()):
        raise ValueError(
            "reward_model: shares trained weights with value_model, so training the value model "
            "would change the scores; give one of them a copy (copy.deepcopy)"
        )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability and router jitter of ``model`` to 0, in train mode too.

    A log-prob under dropout is a random number; the ratio of two of them says nothing.
    """
    for module in model.modules():
        if "Dropout" in type(module).__name__ and isinstance(getattr(module, "p", None), float):
            module.p = 0.0  # type: ignore[assignment]
        # PhiMoE's routers draw experts in train mode; this setting is a threshold in eval mode too
        if hasattr(module, "router_jitter_noise") and not module._forward_pre_hooks:
            module.register_forward_pre_hook(_enter_eval_mode)
        for name, value in list(vars(module).items()):
            if "drop" not in name and name not in JITTERS:
                continue
            # attention modules keep a probability as a float, adapters of peft one by their names
            if isinstance(value, float):
                setattr(module, name, 0.0)
            elif isinstance(value, dict):
                value.update({key: 0.0 for key, p in value.items() if isinstance(p, float)})


def _enter_eval_mode(module: nn.Module, args: Any) -> None:
    module.training = False


@torch.no_grad()
def check_train_mode(policy: LanguageModel, config: PPOConfig) -> None:
    """Check that the update's passes, if they are in train mode, compute what eval mode does.

    Raises:
        ValueError: they do not, because something other than dropout draws random numbers.
    """
    model = policy.model
    if not (config.gradient_checkpointing or any(part.training for part in model.modules())):
        return
    disable_dropout(model)  # of the layers too that a pass has put in, as BigBird's for short rows
    modes = [(part, part.training) for part in model.modules()]
    tokens = probe_tokens(model)
    with computing_in(policy.compute_dtype, policy.device), uncompiled(model):
        try:
            in_train_mode = [run(model.train(), tokens).logits for _ in range(2)]
            in_eval_mode = run(model.eval(), tokens).logits
        finally:
            for part, training in modes:
                part.training = training
    largest = max(relative_difference(logits, in_eval_mode) for logits in in_train_mode)
    if largest > policy.tolerance:
        raise ValueError(
            f"policy_model: in train mode, logits of {type(model).__name__} differ from those in "
            f"eval mode by {largest:.1e}, though dropout is off: the update would not train what "
            "was sampled; set what is random there to 0, or use policy.eval() and "
            "gradient_checkpointing=False"
        )


def enable_gradient_checkpointing(model: nn.Module, name: str) -> None:
    """Enable gradient checkpointing in every transformers model within ``model``.

    It acts in train mode alone.

    Raises:
        ValueError: there is no such model that supports it.
    """
    able: list[Any] = [
        module
        for module in model.modules()
        if getattr(module, "supports_gradient_checkpointing", False)
    ]
    if not able:
        raise ValueError(
            f"gradient_checkpointing: {name} ({type(model).__name__}) holds no transformers model "
            "that supports it; use gradient_checkpointing=False"
        )
    for module in able:
        # the name in newer transformers, which warn of the old one
        enable = getattr(module, "activation_checkpointing_enable", None)
        settings = {"use_reentrant": False, "context_fn": checkpoint_contexts}
        (enable or module.gradient_checkpointing_enable)(settings)
        # non-reentrant checkpointing needs no gradient below the first trained layer
        module.disable_input_require_grads()
