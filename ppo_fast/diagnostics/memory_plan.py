"""Memory that training takes, computed from a transformers config before anything is allocated.

The model is made of fake tensors, which have shapes and no memory. One pass through it counts the
bytes that autograd keeps, which takes seconds for 70B parameters.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ppo_fast.config import PPOConfig
from ppo_fast.critics.baselines import BASELINES
from ppo_fast.critics.make import critic_name
from ppo_fast.diagnostics.activations import kept_activations, microbatches
from ppo_fast.learning.streamed import PIECE_BYTES
from ppo_fast.models.adapters import adapted_layers
from ppo_fast.models.heads import ValueHead, ValueModel
from ppo_fast.models.lora import lora_config, with_adapter
from ppo_fast.models.parts import base_of, body_of
from ppo_fast.models.precision import hold_trained_weights
from ppo_fast.models.quantized import Quantization, packed_bytes, quantization_of
from ppo_fast.models.setup import (
    freeze_matching,
    frozen_copy,
    logits_budget_bytes,
)
from ppo_fast.models.transformers_internals import (
    Conv1D,
    head_size,
    layer_configs,
    layer_types,
)
from ppo_fast.models.trunk import freeze_trunk

FLOAT = 4
TOP = 4
"""Number of top layers in plans with a trunk, where the config gives none."""
MARGIN = 0.1
"""Share of a peak that is added to it: for temporary tensors, gaps between the allocator's blocks,
workspaces of the BLAS and, on a GPU, the CUDA context."""


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a run by its parts, in bytes.

    policy, reference, value_function: weights. The reference and a top do not count those that they
        share with the policy.
    gradients: the most at one time: of both policy and value function; of the larger without
        check_gradients_together, but for a head.
    optimizer: moments of all trained weights.
    trunk_states: trunk states of a batch.
    cache: keys and values of a rollout.
    copies: copies of weights for a rollout: in compute_dtype; on the CPU with adapters merged, and
        in int8 (rollout_weights).
    kept_rollout: the part of cache and copies that stays during the update (kept_rollout_bytes).
    activations: what autograd keeps of one microbatch, without logits.
    logits: tiles of the LM head's logits that are kept for the backward pass.
    reward_model: weights of the reward, where it is a model.
    undo: the copy from before an update (undo_updates), where training is on the CPU.
    offload: parts that rest in host memory: "optimizer", "reference", "reward".
    piece: the most of the moments that is on the device at one time if they rest there.
    """

    policy: int
    reference: int
    value_function: int
    gradients: int
    optimizer: int
    trunk_states: int
    cache: int
    copies: int
    kept_rollout: int
    activations: int
    logits: int
    reward_model: int = 0
    undo: int = 0
    offload: tuple[str, ...] = ()
    piece: int = 0

    @property
    def peak(self) -> int:
        """Max bytes at one time: gradients and activations come when the rollout is done."""
        away = self._away
        held = self.policy + self.value_function + self.trunk_states + self.undo - self.host
        held += self.optimizer + self.reference + self.reward_model
        passes = max(away.get("reference", 0), away.get("reward", 0))  # one after the other
        step = min(self.piece, away.get("optimizer", 0))  # when activations are gone
        update = self.gradients + max(self.activations + self.logits, step)
        return held + max(self.cache + self.copies, self.kept_rollout + max(passes, update))

    @property
    def host(self) -> int:
        """Bytes that rest in host memory."""
        return sum(self._away.values())

    @property
    def _away(self) -> dict[str, int]:
        sizes = {"optimizer": self.optimizer, "reference": self.reference}
        sizes["reward"] = self.reward_model
        return {name: size for name, size in sizes.items() if name in self.offload}

    @property
    def with_margin(self) -> int:
        """The peak and ``MARGIN`` of it: what a device should have."""
        return round(self.peak * (1 + MARGIN))


def plan_memory(
    model_config: Any,
    config: PPOConfig,
    *,
    batch_size: int,
    prompt_length: int,
    value_model: nn.Module | None = None,
    policy_model: nn.Module | None = None,
    adapter: Any = None,
    quantization: Quantization | None = None,
    reward_bytes: int = 0,
    device: str = "cuda",
) -> MemoryPlan:
    """Plan the memory of training a policy of ``model_config``.

    Args:
        model_config: transformers config of a causal LM whose head is fused (linear_logprobs).
        config: settings of the training.
        batch_size: prompts per step.
        prompt_length: max tokens of a prompt.
        value_model: for ``critic="model"``; None: a ``ValueModel`` over a copy of the policy.
        policy_model: the policy, whose trunk ``value_model`` may share; None: it shares nothing.
        adapter: peft's config of a new adapter of the policy; None: that of ``policy_model``.
        quantization: bits of the linear layers under the adapter; None: those of ``policy_model``.
        reward_bytes: the weights of a reward that is a model (``classifier_bytes``).
        device: type of the device to train on.

    Raises:
        ValueError: the model cannot be split, or its layers cannot be cached.
    """
    text: Any = model_config.get_text_config()
    adapters: Any = getattr(policy_model, "peft_config", None) or {}
    adapter = adapter or next(iter(adapters.values()), None)
    quantization = quantization or (policy_model and quantization_of(policy_model)) or None
    length, k = prompt_length + config.max_length, config.num_layers_unfrozen
    sequences = batch_size * config.samples_per_prompt
    padded, packed_tokens = microbatches(config, sequences, prompt_length)
    responses = len(packed_tokens or padded)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    policy = _policy(fake, model_config, config, adapter)
    packed = [] if quantization is None else _quantizable(policy)
    value, valued = _value_weights(fake, policy, model_config, config, value_model)
    with fake, warnings.catch_warnings():
        # torch's own copying of a parameter warns of it, without need
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        # new adapters are left out, others copied: they are small
        reference = None if adapter is not None else frozen_copy(policy, config)
        activations = kept_activations(policy, k, padded, packed_tokens, config)
        copies = _bytes(_copied(policy, config, device, packed))
        if config.rollout_weights == "int8" and device == "cpu" and not packed:
            copies += _int8_bytes(policy)
    trained = [*_trained(policy.parameters()), *valued]
    rounded = 2 * _count(trained) if config.trained_weights == "kahan" else 0
    moments = 2 * FLOAT * _count(trained) + rounded
    computed = FLOAT if config.compute_dtype is None else 2
    kept = computed if config.trunk_dtype is None else 2
    layers = zip(layer_configs(text), layer_types(text), strict=True)
    slots = min(config.rollout_slots or sequences, sequences)
    per_token = 2 * sum(_kv_heads(of_layer) * head_size(of_layer) for of_layer, _ in layers)
    # fused layers (fused_layers.py) cache float32 unless kv_cache_dtype says otherwise
    cached = FLOAT if device == "cpu" and not packed else computed
    cached = cached if config.kv_cache_dtype is None else 2
    cache = cached * per_token * slots * length
    keeps = device == "cuda" and config.cuda_graphs and not adapted_layers(policy)
    most = config.kept_rollout_bytes if keeps else 0
    return MemoryPlan(
        policy=_bytes(set(policy.parameters()) - set(packed))
        + sum(packed_bytes(weight, quantization) for weight in packed if quantization),
        reference=0 if reference is None else _bytes(_own(reference, policy)),
        value_function=_bytes(set(value) - set(policy_model.parameters() if policy_model else ())),
        # a head's gradients always come together with the policy's
        gradients=_bytes(trained)
        if config.critic == "head" or config.check_gradients_together
        else max(_bytes(_trained(policy.parameters())), _bytes(valued)),
        optimizer=moments,
        # those of a prompt once for its samples
        trunk_states=0
        if k is None
        else kept * (batch_size * prompt_length + sequences * config.max_length) * text.hidden_size,
        cache=cache,
        copies=copies,
        kept_rollout=sum(size for size in (cache, copies) if size <= most),
        activations=activations,
        logits=min(
            FLOAT * responses * config.max_length * text.vocab_size, logits_budget_bytes(config)
        ),
        reward_model=reward_bytes,
        undo=_bytes(trained) + moments if config.undo_updates and device == "cpu" else 0,
        offload=() if device == "cpu" else config.offload,
        piece=max([PIECE_BYTES, *(2 * FLOAT * weight.numel() for weight in trained)]),
    )


def classifier_bytes(model_config: Any) -> int:
    """Return the bytes of a sequence classifier's weights in float32, as a reward is loaded."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(model_config, dtype=torch.float32)
    return _bytes(model.parameters())


def plans(
    model_config: Any,
    config: PPOConfig,
    *,
    batch_size: int,
    prompt_length: int,
    lora_rank: int = 16,
    quantization: Quantization | None = None,
    reward_bytes: int = 0,
    device: str = "cuda",
) -> dict[str, MemoryPlan]:
    """Plan several ways to train a policy; return the plans by name.

    Plans with LoRA are made where peft is installed; ``quantization`` is of the weights under it.
    """
    layers = model_config.get_text_config().num_hidden_layers
    k = min(config.num_layers_unfrozen or TOP, layers - 1)
    ways: dict[str, dict[str, Any]] = {
        "all layers, a value model": {"critic": "model", "num_layers_unfrozen": None},
        "all layers, a value head": {"critic": "head", "num_layers_unfrozen": None},
    }
    if k > 0:
        ways |= {
            f"{k} top layers, a top critic": {"critic": "top", "num_layers_unfrozen": k},
            f"{k} top layers, a value head": {"critic": "head", "num_layers_unfrozen": k},
        }
    adapters: dict[str, Any] = {}
    if importlib.util.find_spec("peft"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
        bits = "" if quantization is None else f" on {quantization[0]} bits"
        name = f"LoRA of rank {lora_rank}{bits}, a value head"
        ways[name] = {"critic": "head", "num_layers_unfrozen": None}
        adapters[name] = lora_config(model, lora_rank)
        if k > 0:
            name = f"LoRA on {k} top layers{bits and f', {quantization}'}, a value head"
            ways[name] = {"critic": "head", "num_layers_unfrozen": k}
            adapters[name] = lora_config(model, lora_rank, k)
    return {
        name: plan_memory(
            model_config,
            replace(config, **({"value_frozen": ()} if way["critic"] == "head" else {}) | way),
            batch_size=batch_size,
            prompt_length=prompt_length,
            adapter=adapters.get(name),
            quantization=quantization if name in adapters else None,
            reward_bytes=reward_bytes,
            device=device,
        )
        for name, way in ways.items()
    }


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


def _own(module: nn.Module, other: nn.Module) -> list[nn.Parameter]:
    """Return the weights of ``module`` that are not ``other``'s."""
    shared = set(other.parameters())
    return [p for p in module.parameters() if p not in shared]


def _policy(fake: FakeTensorMode, model_config: Any, config: PPOConfig, adapter: Any) -> Any:
    """Make the policy of fake tensors, prepared as the trainer prepares it."""
    stored = torch.float32 if config.compute_dtype is None else model_config.dtype
    with torch.device("meta"):  # peft moves what it adds, and fake tensors cannot move
        policy = AutoModelForCausalLM.from_config(model_config, dtype=stored or torch.float32)
        if adapter is not None:
            policy = with_adapter(policy, adapter)
    with fake:
        policy.to_empty(device="cpu")
        base_of(policy).tie_weights()
        if config.num_layers_unfrozen is not None:
            freeze_trunk(policy, config.num_layers_unfrozen)
        freeze_matching(policy, config.frozen, "frozen")
        hold_trained_weights(policy, config.weights_dtype)
    return policy


def _value_weights(
    fake: FakeTensorMode,
    policy: Any,
    model_config: Any,
    config: PPOConfig,
    value_model: nn.Module | None,
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the value function's own weights, and the trained ones among them."""
    critic = critic_name(config, value_model)
    if critic in BASELINES:
        return [], []
    hidden_size = policy.config.get_text_config().hidden_size
    if critic == "model":
        if value_model is None:
            base = _policy(fake, model_config, replace(config, num_layers_unfrozen=None), None)
            with fake:
                value_model = ValueModel(base, hidden_size)
        own, unread = list(value_model.parameters()), _lm_head(value_model)
        return own, [p for p in _trained(own) if p not in unread]
    top = _trained(body_of(policy).parameters()) if critic == "top" else []
    with fake:
        own = [*top, *ValueHead(hidden_size).parameters()]
    return own, own


def _lm_head(value_model: nn.Module) -> set[nn.Parameter]:
    """Return the LM head's weights in a ValueModel, which never reads them.

    A weight that is tied to the embedding is left out; other modules have none.
    """
    if not isinstance(value_model, ValueModel):
        return set()
    base: Any = value_model.base_model
    head = getattr(base, "get_output_embeddings", lambda: None)()
    return set() if head is None else {*head.parameters()} - {base.get_input_embeddings().weight}


def _quantizable(policy: Any) -> list[Any]:
    """Return the weights that a quantised policy has in 4 or 8 bits: of layers under adapters."""
    head = policy.get_output_embeddings()
    return [
        module.weight
        for module in policy.modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not head
        and not module.weight.requires_grad
    ]


def _copied(
    policy: Any, config: PPOConfig, device: str, packed: list[Any]
) -> Iterator[torch.Tensor]:
    """Yield the weights that a rollout copies; those in 4 or 8 bits are not among them."""
    own = set(policy.parameters()) - set(packed)
    if config.compute_dtype is not None:
        yield from (p.bfloat16() for p in own if p.dtype == torch.float32)
    if device == "cpu" and not packed:
        merged = (adapted.layer.base_layer.weight for adapted in adapted_layers(policy))
        yield from (w if config.compute_dtype is None else w.bfloat16() for w in merged)


def _int8_bytes(policy: Any) -> int:
    """Return the bytes of linear layers in int8, of a Conv1D too where its layer is fused."""
    adapted = {one.layer for one in adapted_layers(policy)}
    adapters = {m for layer in adapted for m in layer.modules() if m is not layer.base_layer}
    outputs = {
        module: module.weight.shape[1 if isinstance(module, Conv1D) else 0]
        for module in policy.modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module not in adapters
    }
    return sum(module.weight.numel() + FLOAT * count for module, count in outputs.items())
