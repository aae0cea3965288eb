"""Save a run's policy and critic in forms that transformers and peft load without ppo_fast."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForTokenClassification, PreTrainedModel

from ppo_fast.checkpointing.identity import trained_state
from ppo_fast.config import PPOConfig
from ppo_fast.critics.critic import Critic
from ppo_fast.exports.export_folder import exported
from ppo_fast.exports.model_card import ModelCard
from ppo_fast.models.adapters import merged_adapters
from ppo_fast.models.heads import TopValue, ValueHead, ValueModel
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.parts import base_of, body_of
from ppo_fast.models.probe import probe_tokens, relative_difference
from ppo_fast.models.quantized import quantization_of, quantized_layers
from ppo_fast.models.trunk import run

logger = logging.getLogger(__name__)

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# Largest relative difference between a saved classifier's logits and the critic's values: rounding.
TOLERANCE = 1e-4


class Trained(Protocol):
    """Interface of PPO that saving its critic uses."""

    policy: LanguageModel
    critic: Critic

    @property
    def config(self) -> PPOConfig: ...

    @property
    def tokenizer(self) -> Any: ...


def export_policy(
    policy: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    adapter_only: bool = False,
    card: ModelCard | None = None,
) -> Literal["policy", "adapter"]:
    """Save a policy and its tokenizer: a whole model, or its adapter alone.

    A whole model has its adapters merged, in float32 (in half precision most of what they learned
    would be rounded away), and ``AutoModelForCausalLM`` loads it. An adapter is
    loaded by ``peft.PeftModel.from_pretrained(base, folder)``. Of a quantised base, whose weights
    cannot take the adapter in, the adapter alone is saved.

    Args:
        policy: the transformers model, or peft's wrapper of it.
        tokenizer: the policy's.
        folder: replaced when the new one is complete.
        adapter_only: save the adapter alone.
        card: written as README.md, with its kind set to what is saved; None: none of ours.

    Returns:
        What was saved.

    Raises:
        ValueError: ``adapter_only`` of a policy that is in no wrapper of peft's.
        OSError: the folder cannot be written; what it held before stays.
    """
    folder, quantized = Path(folder), bool(quantized_layers(policy))
    kind: Literal["policy", "adapter"] = "adapter" if adapter_only or quantized else "policy"
    if kind == "adapter":
        _check_has_adapter(policy)
    if quantized:
        logger.info("the base is quantised: its adapter is saved, not a whole model")
    with exported(folder) as new:
        if kind == "policy":
            base: Any = base_of(policy)
            dtype = base.config.dtype
            try:
                with merged_adapters(policy, in_float32=True):
                    base.save_pretrained(new)  # which notes the dtype in the config
            finally:
                base.config.dtype = dtype
        else:  # "auto" would ask the hub for the base model's vocabulary
            policy.save_pretrained(new, save_embedding_layers=False)
        tokenizer.save_pretrained(new)
        if card is not None:
            how = quantization_of(policy)
            replace(card, kind=kind, quantization=how).write(new)
    return kind


def _check_has_adapter(policy: Any) -> None:
    if base_of(policy) is policy or not hasattr(policy, "peft_config"):
        raise ValueError(
            f"policy: {type(policy).__name__} has no adapter of peft to save; use "
            "adapter_only=False, or peft.get_peft_model(model, ...)"
        )


def save_critic(
    ppo: Trained, folder: str | Path, *, whole: bool = False, card: ModelCard | None = None
) -> None:
    """Save the critic's weights, or a whole classifier of tokens with one label.

    By default the folder gets the weights that were trained, by their names in
    ``ppo.critic.module``, in model.safetensors, and a config.json that says what they are.

    With ``whole``, ``AutoModelForTokenClassification.from_pretrained(folder)`` gives logits
    [B, L, 1]: at each token the value of the state that ends with it, which is the value before the
    next token.

    Args:
        ppo: the trainer.
        folder: replaced when the new one is complete.
        whole: copy the backbone too.
        card: written as README.md, with its kind set; None: none.

    Raises:
        ValueError: the critic has no weights, or ``whole`` and transformers has no class that
            computes its values.
        OSError: the folder cannot be written; what it held before stays.
    """
    folder, module = Path(folder), ppo.critic.module
    if not ppo.critic.trained:
        raise ValueError(f"critic: {type(ppo.critic).__name__} has no weights to save")
    if whole:
        model = token_classifier(ppo)
        with exported(folder) as new:
            model.save_pretrained(new)
            ppo.tokenizer.save_pretrained(new)
            if card is not None:
                replace(card, kind="critic").write(new)
        return
    state = {name: w.detach().cpu().clone() for name, w in trained_state(module).items()}
    base: Any = base_of(ppo.policy.model)
    description = {
        "ppo_fast_critic": type(module).__name__,
        "hidden_size": ppo.policy.states_size,
        "base_model": base.config.name_or_path,
        "states": _states_read(module),
        "num_layers_unfrozen": ppo.config.num_layers_unfrozen,
    }
    with exported(folder) as new:
        save_file(state, new / WEIGHTS, {"format": "pt"})
        (new / CONFIG).write_text(json.dumps(description, indent=2), "utf-8")
        if card is not None:
            replace(card, kind="critic's weights").write(new)


def load_critic(module: nn.Module, folder: str | Path) -> None:
    """Load what ``save_critic`` wrote (without ``whole``) into a critic: ``ppo.critic.module``.

    Raises:
        FileNotFoundError: the folder has no such files.
        ValueError: they are of another kind of critic, or of other sizes.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"critic: {folder} holds no {CONFIG} and {WEIGHTS}")
    saved = json.loads((folder / CONFIG).read_text("utf-8")).get("ppo_fast_critic")
    if saved != type(module).__name__:
        raise ValueError(f"critic: {folder} holds a {saved}, expected a {type(module).__name__}")
    state, own = load_file(folder / WEIGHTS), trained_state(module)
    shapes, expected = ({n: tuple(w.shape) for n, w in s.items()} for s in (state, own))
    if different := sorted(set(shapes.items()) ^ set(expected.items())):
        name = different[0][0]
        raise ValueError(
            f"critic: in {folder}, {name} has shape {shapes.get(name)}, expected "
            f"{expected.get(name)}"
        )
    module.load_state_dict(state, strict=False)  # frozen weights are the base model's


@torch.no_grad()
def token_classifier(ppo: Trained) -> PreTrainedModel:
    """Return a transformers token classifier whose logits [B, L, 1] are the critic's values.

    Raises:
        ValueError: the critic's head is not linear, its backbone is quantised, or transformers has
            no such class for the family, or one that computes something else.
    """
    body, head = check_token_classifier(ppo)
    with merged_adapters(body, in_float32=True):
        state = body.state_dict()
        config = copy.deepcopy(body.config)
        config.num_labels, config.id2label, config.label2id = 1, {0: "value"}, {"value": 0}
        dtypes = {weight.dtype for weight in state.values() if weight.is_floating_point()}
        dtype = torch.float32 if torch.float32 in dtypes else next(iter(dtypes))
        # the head's first weights are drawn, by the CPU's generator alone
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            model = AutoModelForTokenClassification.from_config(config, dtype=dtype).eval()
        model.to(ppo.policy.device)
        getattr(model, model.base_model_prefix).load_state_dict(state)
        own = _linear_with_one_output(model)
        own.weight.copy_(head.weight)
        if own.bias is not None:
            own.bias.copy_(0.0 if head.bias is None else head.bias)
        tokens, modes = probe_tokens(model), [(part, part.training) for part in body.modules()]
        states = run(body.eval(), tokens).last_hidden_state
        for part, training in modes:
            part.training = training
        expected = head(states.to(head.weight.dtype))
    found, real = run(model, tokens).logits, tokens.attention_mask.bool()
    difference = relative_difference(found[real].float(), expected[real].float())
    if not difference <= TOLERANCE * (1 if dtype == torch.float32 else 100):
        raise ValueError(
            f"critic: {type(model).__name__} gives other values (by {difference:.1e}); use "
            "whole=False"
        )
    return model


def check_token_classifier(ppo: Trained) -> tuple[Any, nn.Linear]:
    """Return the critic's body and head if transformers has a class for them; no model is copied.

    Raises:
        ValueError: see ``token_classifier``.
    """
    body, head = _body_and_head(ppo)
    if quantized_layers(body):
        raise ValueError(
            "critic: its backbone is quantised, so that no whole is saved; use whole=False"
        )
    if type(body.config) not in AutoModelForTokenClassification._model_mapping:
        raise ValueError(
            f"critic: transformers has no token classifier for {body.config.model_type!r}; use "
            "whole=False"
        )
    return body, head


def _body_and_head(ppo: Trained) -> tuple[Any, nn.Linear]:
    """Return the transformer whose last states, after its final norm, the linear head reads."""
    module = ppo.critic.module
    if isinstance(module, ValueHead):
        assert ppo.policy.body is not None
        return ppo.policy.body, module.linear
    if isinstance(module, TopValue):
        return module.body, module.head.linear
    if isinstance(module, ValueModel) and isinstance(module.value_head, nn.Linear):
        return body_of(module.base_model), module.value_head
    head = "a small MLP" if isinstance(module, ValueModel) else "not known"
    raise ValueError(
        f"critic: the head of a {type(module).__name__} is {head}, for which transformers has no "
        "class; use whole=False"
    )


def _linear_with_one_output(model: nn.Module) -> nn.Linear:
    heads = [
        child
        for child in model.children()
        if isinstance(child, nn.Linear) and child.out_features == 1
    ]
    if len(heads) != 1:
        raise ValueError(f"critic: {type(model).__name__} has no linear head; use whole=False")
    return heads[0]


def _states_read(module: nn.Module) -> str:
    what = {
        ValueHead: "the policy's last hidden states, after its final norm",
        TopValue: "the last hidden states of its own top layers on the policy's trunk, after its "
        "own final norm",
    }
    before = "; the state before a token gives its value"
    return what.get(type(module), "its own") + before
