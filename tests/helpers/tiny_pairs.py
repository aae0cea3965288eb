"""Preference pairs that a tiny model learns to tell apart."""

from __future__ import annotations

import random
from typing import Any

PHRASES = ["there", "bread", "the rain", "three songs", "another year", "the phone", "other guests"]
SHORT_PROMPTS = ["The film was", "She thought", "Nothing in this room"]


def tiny_pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The chosen response ends with " good", the rejected one with " bad"; the rest is chance."""
    draw = random.Random(seed)

    def words() -> str:
        return "".join(f" {draw.choice(PHRASES)}" for _ in range(draw.randint(1, 4)))

    return [
        {
            "prompt": draw.choice(SHORT_PROMPTS),
            "chosen": f"{words()} good",
            "rejected": f"{words()} bad",
        }
        for _ in range(count)
    ]


def as_chats(pair: dict[str, Any]) -> dict[str, Any]:
    """The pair as two chats with the prompt in them."""
    asked = {"role": "user", "content": pair["prompt"]}
    return {
        side: [asked, {"role": "assistant", "content": pair[side]}]
        for side in ("chosen", "rejected")
    }
