"""Trainers whose rewards are asked for each response as it ends."""

from __future__ import annotations

from tiny_trainer import PROMPTS, tiny_trainer

ROWS = [{"prompt": text, "answer": i} for i, text in enumerate(PROMPTS)]


def trainer_of(reward, **options):
    # about one token in three ends a response
    return tiny_trainer(reward, critic="baseline", **{"max_length": 12} | options)
