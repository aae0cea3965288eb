"""Decoding tells of each response as soon as it has ended, once, with all of its ids."""

from __future__ import annotations

import pytest
import torch
from tiny_models import PAD_ID, tiny_model
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.rollout import Sampling, Turn, decode
from ppo_fast.rollout.own_cache import own_cache
from ppo_fast.rollout.turns import Turns

# About one token in eight ends a turn.
EOS_IDS = list(range(40))
PROMPTS = [[5, 61, 7, 300, 12, 8], [44], [3, 2, 91, 250], [90, 90, 90], [44], [77, 78]]


class Once:
    """Replies to the first turn."""

    def __init__(self) -> None:
        self.turns = 0

    def reply(self, turn: Turn) -> list[int] | None:
        self.turns += 1
        return [50, 51, 52] if self.turns == 1 else None


def turns() -> Turns:
    return Turns([Once() for _ in PROMPTS], encode=list, to_text=str, vocab_size=307)


def gpt_neo() -> LanguageModel:
    """A model that decodes with its own cache."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=307,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=64,
    )
    model = LanguageModel(GPTNeoForCausalLM(config).eval())
    assert own_cache(model) is not None
    return model


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (lambda: LanguageModel(tiny_model()), {}),
        (lambda: LanguageModel(tiny_model()), {"slots": 2}),
        (
            lambda: LanguageModel(tiny_model(layers=3), num_layers_unfrozen=1),
            {"whole_trunk": True, "slots": 2},
        ),
        (gpt_neo, {}),
        (gpt_neo, {"slots": 1}),
    ],
    ids=["slots", "two-slots", "whole-trunk", "own-cache", "own-cache-by-one"],
)
@pytest.mark.parametrize("replies", [False, True], ids=["one-turn", "turns"])
def test_each_response_once_with_its_ids(model, options, replies):
    told: dict[int, list[int]] = {}

    def ended(row: int, ids: list[int]) -> None:
        assert row not in told
        told[row] = ids

    rollout = decode(
        model(),
        PROMPTS,
        Sampling(16, temperature=0.8),
        seeds=torch.arange(len(PROMPTS)) + 100,
        eos_ids=EOS_IDS,
        pad_id=PAD_ID,
        turns=turns() if replies else None,
        ended=ended,
        **options,
    )
    lengths = rollout.tokens.response_lengths.tolist()
    rows = zip(rollout.tokens.response_ids.tolist(), lengths, strict=True)
    assert told == {i: ids[:n] for i, (ids, n) in enumerate(rows)}
    assert rollout.finished.any()
    if options == {} and model is not gpt_neo:
        order = [lengths[row] for row in told]
        assert order == sorted(order), "they begin together, and the shortest ends first"
