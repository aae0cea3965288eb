"""AdamW with the settings of a PPOConfig, and the clipping of gradients before its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import AdamW, Optimizer

from ppo_fast.config import PPOConfig
from ppo_fast.learning.half_adamw import HalfAdamW


def make_adamw(module: nn.Module, learning_rate: float, config: PPOConfig) -> Optimizer:
    """Make AdamW for the trained weights of ``module``; HalfAdamW where they are in bfloat16.

    Weight decay leaves biases and the weights of norms alone: all that have one dimension.
    """
    trained = _groups(module, config.weight_decay)
    settings: dict[str, Any] = {
        "lr": learning_rate,
        "betas": config.adam_betas,
        "eps": config.adam_eps,
        "weight_decay": config.weight_decay,
    }
    if config.trained_weights == "float32":
        return AdamW(trained, **settings | {config.adamw: True})
    return HalfAdamW(trained, **settings, rounding=config.trained_weights, seed=config.seed)


def _groups(module: nn.Module, weight_decay: float) -> list[Any]:
    """Return the trained weights of ``module``; with decay, in groups with and without it."""
    trained = [p for p in module.parameters() if p.requires_grad]
    alone = [p for p in trained if p.dim() < 2]
    if weight_decay == 0 or not alone:
        return trained
    decayed = [p for p in trained if p.dim() >= 2]
    return [{"params": decayed}, {"params": alone, "weight_decay": 0.0}]


def clip_gradients(weights: Sequence[Tensor], bound: float, norm: Tensor) -> None:
    """Scale the gradients of ``weights``, whose norm is ``norm`` (0-dim), down to ``bound``.

    torch multiplies gradients within the bound by 1. On the CPU they are left alone, to the same
    bits; on a GPU, reading the norm would wait for the device.
    """
    if norm.is_cpu and bound / (norm + 1e-6) >= 1:
        return
    clip_grads_with_norm_(weights, bound, norm)
