"""The model of a training run: made from what the user gives, with the weights that are trained."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ppo_fast.models.adapters import adapted_layers
from ppo_fast.models.heads import RewardModel
from ppo_fast.models.lora import lora_config
from ppo_fast.models.parts import body_of
from ppo_fast.models.patching import replaced_forwards
from ppo_fast.models.precision import HALF, hold_trained_weights
from ppo_fast.models.quantized import packed_weights, to_float32
from ppo_fast.models.trunk import freeze_trunk
from ppo_fast.ops.gradient import without_autocast
from ppo_fast.rewards.fit.settings import RewardModelConfig

logger = logging.getLogger(__name__)


def as_reward_model(model: Any, tokenizer: PreTrainedTokenizerBase, seed: int) -> nn.Module:
    """Return a model that gives one score a text: the given one, or a classifier with its body.

    A causal LM becomes the sequence classifier that transformers has for its family. Its body is
    copied, so that training does not change the causal LM; the new head is drawn by ``seed``.

    Raises:
        TypeError: it is none of these.
        ValueError: a classifier with several labels, a model in a peft wrapper, or a causal LM of a
            family that has no sequence classifier.
    """
    if isinstance(model, nn.Module) and adapted_layers(model):
        raise ValueError("model: it has adapters; merge them first (model.merge_and_unload())")
    if isinstance(model, RewardModel):
        return model
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: got {type(model).__name__}, expected a sequence classifier of transformers, a "
            "causal LM or a ppo_fast.RewardModel"
        )
    if type(model).__name__.endswith("ForSequenceClassification"):
        if model.config.num_labels != 1:
            raise ValueError(
                f"model: {type(model).__name__} has num_labels={model.config.num_labels}, expected "
                "1; load it with num_labels=1, ignore_mismatched_sizes=True"
            )
        classifier = model
    elif model.get_output_embeddings() is not None and not model.config.is_encoder_decoder:
        classifier = _classifier_of(model, seed)
    else:
        raise TypeError(
            f"model: got {type(model).__name__}, expected a sequence classifier of transformers "
            "(AutoModelForSequenceClassification), a causal LM or a ppo_fast.RewardModel"
        )
    text_config = classifier.config.get_text_config()
    if text_config.pad_token_id in (None, -1):  # decoders find a text's end by it
        text_config.pad_token_id = classifier.config.pad_token_id = tokenizer.pad_token_id
    return classifier


def _classifier_of(causal_lm: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Return the family's sequence classifier with one label and a copy of the LM's body."""
    kind, body = type(causal_lm).__name__, body_of(causal_lm)
    config = copy.deepcopy(causal_lm.config)
    config.num_labels = 1
    mend = "use ppo_fast.RewardModel(model, hidden_size)"
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"model: transformers has no sequence classifier of {kind}'s family; {mend}"
        )
    with torch.device("meta"):  # without weights
        classifier = AutoModelForSequenceClassification.from_config(config)
    prefix = str(classifier.base_model_prefix)
    others = [(name, m) for name, m in classifier.named_children() if name != prefix]
    is_linear = len(others) == 1 and isinstance(others[0][1], nn.Linear)
    if type(getattr(classifier, prefix, None)) is not type(body) or not is_linear:
        raise ValueError(f"model: transformers' classifier of {kind} has another body; {mend}")
    setattr(classifier, prefix, copy.deepcopy(body))
    name, head = others[0]
    setattr(classifier, name, _new_head(head, next(body.parameters()), seed))
    return classifier.eval()


def _new_head(empty: nn.Linear, like: Tensor, seed: int) -> nn.Linear:
    """Return a head drawn from N(0, 1 / (D + 1)) (Stiennon et al. 2020, appendix C), bias 0."""
    width, generator = empty.in_features, torch.Generator("cpu").manual_seed(seed)
    # nn.Linear itself would draw from torch's global generator
    head = nn.utils.skip_init(
        nn.Linear, width, 1, bias=empty.bias is not None, device="cpu", dtype=torch.float32
    )
    with torch.no_grad():
        head.weight.normal_(0, (width + 1) ** -0.5, generator=generator)
        if head.bias is not None:
            head.bias.zero_()
    return head.to(like.device, like.dtype)


def choose_trained(model: nn.Module, config: RewardModelConfig) -> None:
    """Freeze what the config does not train, add adapters, and hold trained weights in float32.

    Raises:
        ValueError: a bad number of layers, adapters on quantised weights, or peft is not installed.
    """
    packed = packed_weights(model)
    if config.lora_rank is not None and packed:
        raise ValueError(
            "model: its weights are quantised, and adapters cannot be merged into them; load it "
            "without quantization"
        )
    base = model.base_model if isinstance(model, RewardModel) else model
    assert isinstance(base, nn.Module)
    body = body_of(base)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # quantised ones are not
    if config.num_layers_unfrozen is not None:
        freeze_trunk(base, config.num_layers_unfrozen)
    if config.lora_rank is not None:
        _add_adapters(base, config)
    of_body = {id(p) for p in body.parameters()}
    of_base = {id(p) for p in base.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in of_body:
            # the head; a RewardModel does not use its causal LM's own
            unused = isinstance(model, RewardModel) and id(parameter) in of_base
            parameter.requires_grad_(not unused)
    halves = any(p.dtype in HALF and p not in packed for p in model.parameters())
    if config.compute_dtype is None and halves:
        logger.warning("model: its half-precision weights become float32; see compute_dtype")
        to_float32(model)
    hold_trained_weights(model, torch.float32)


def _add_adapters(base: Any, config: RewardModelConfig) -> None:
    """Add new LoRA adapters, drawn by the seed, in place; the rest of the model is frozen."""
    assert config.lora_rank is not None
    chosen = lora_config(base, config.lora_rank, config.num_layers_unfrozen)
    from peft import inject_adapter_in_model

    base.requires_grad_(False)
    # torch.manual_seed would seed the GPUs' generators too
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(config.seed)
        inject_adapter_in_model(replace(chosen, task_type="SEQ_CLS"), base)
    base.eval()


def merge_adapters(model: nn.Module) -> None:
    """Merge all adapters of a model into its weights, in place and in float32."""
    for parent, name, layer in adapted_layers(model):
        to_float32(layer)  # rounded to half precision, most of what was learned would be lost
        layer.merge()
        parent.register_module(name, layer.base_layer)


def head_in_its_dtype(model: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    """Within the block, compute what is outside the body in its weights' dtype, not by autocast.

    Rewards in bfloat16 would have 8 significant bits: close ones would be equal.
    """
    base = model.base_model if isinstance(model, RewardModel) else model
    assert isinstance(base, nn.Module)
    body = body_of(base)
    heads = [
        child
        for child in model.children()
        if any(True for _ in child.parameters()) and all(m is not body for m in child.modules())
    ]
    return replaced_forwards([(head, _without_autocast(head, device)) for head in heads])


def _without_autocast(head: nn.Module, device: torch.device) -> Callable[..., Any]:
    forward, dtype = head.forward, next(head.parameters()).dtype

    def run(states: Tensor, *others: Any, **named: Any) -> Any:
        with without_autocast(device):
            return forward(states.to(dtype), *others, **named)

    return run


def rewards_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Compute rewards [n] float32 of a right-padded batch."""
    if isinstance(model, RewardModel):  # as a trainer calls it
        last = batch["attention_mask"].sum(1) - 1
        return model(batch["input_ids"], last=last).float()
    return model(**batch).logits[:, 0].float()
