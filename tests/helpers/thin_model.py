"""Sizes of a model so thin that its steps can be computed in a test."""

from __future__ import annotations

import gpu_steps

THIN = gpu_steps.MODELS["SmolLM2-135M"] | {
    "num_hidden_layers": 2,
    "hidden_size": 36,
    "intermediate_size": 16,
    "vocab_size": 64,
}
