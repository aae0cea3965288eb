"""A small batch of Tokens, with padding on both sides."""

from __future__ import annotations

import torch

from ppo_fast.data.tokens import Tokens, make_tokens

PROMPTS = [[5, 61, 7, 300], [44], [3, 2, 91]]
RESPONSES = [[12, 0], [9, 250, 17, 33, 0], [306, 1, 8]]


def batch(pad_id: int = 0) -> Tokens:
    """Return prompts and responses of different lengths."""
    return make_tokens(PROMPTS, RESPONSES, pad_id, torch.device("cpu"))
