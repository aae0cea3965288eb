"""Tiny policies with peft's adapters."""

from __future__ import annotations

import torch
from peft import get_peft_model
from tiny_models import VOCAB_SIZE, tiny_model
from torch import nn

from ppo_fast.models.lora import lora_config


def base_model(family="llama"):
    """One token in twelve ends a response."""
    model = tiny_model(family, layers=3, hidden=32)
    model.generation_config.eos_token_id = list(range(0, VOCAB_SIZE, 12))
    return model


def adapted(family="llama", k=None, *, seed=0, trained=False, dora=False):
    """A policy with adapters in its ``k`` top layers; ``trained``: not as they start."""
    model = base_model(family)
    config = lora_config(model, 4, k)
    config.use_dora = dora
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = get_peft_model(model, config)
        for name, weight in policy.named_parameters():
            if trained and "lora_B" in name:
                nn.init.normal_(weight, std=0.05)
    return policy


def split_names(module):
    """Of its adapters' weights, and of the others."""
    names = {name for name, _ in module.named_parameters()}
    adapters = {name for name in names if "lora_" in name}
    return adapters, names - adapters
