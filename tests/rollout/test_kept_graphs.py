"""Graphs and buffers that an engine keeps: the next rollout replays them and draws the same."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from recorded_ops import as_on_a_gpu, recorded_ops
from tiny_models import PAD_ID, tiny_model
from tiny_rollouts import EOS_IDS, PROMPTS, SEEDS, sample, texts

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.rollout import LocalEngine, Sampling, buffers
from ppo_fast.rollout.speedups import cuda_graph_check

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_a_gpu():
    with as_on_a_gpu():
        yield


class Captures:
    """Counts captures, and makes them with ``recorded_ops``."""

    def __init__(self, monkeypatch):
        self.number = 0
        monkeypatch.setitem(cuda_graph_check.CAPTURES, "cpu", self)

    def __call__(self, device):
        capture = recorded_ops(device)

        def counting(step):
            self.number += 1
            return capture(step)

        return counting


@pytest.fixture
def captures(monkeypatch):
    return Captures(monkeypatch)


def engine_of(model, kept_bytes, **options):
    settings = {"eos_ids": lambda: EOS_IDS, "pad_id": PAD_ID, "slots": 5} | options
    return LocalEngine(model, kept_bytes=kept_bytes, **settings)


def assert_same(found, expected):
    assert texts(found) == texts(expected)
    assert found.finished.tolist() == expected.finished.tolist()
    for name in ("logprobs", "sampling_logprobs", "states"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    torch.testing.assert_close(found.trunk_states.states, expected.trunk_states.states)


def other_weights(model):
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter *= 1.05


def at_another_address(model):
    weight = model.model.model.layers[-1].mlp.up_proj.weight
    weight.data = 1.3 * weight.data


SMALLER, LARGER = slice(1, 7), [[i, 7, 9] for i in range(3, 12)]


@pytest.mark.parametrize(
    ("change", "prompts", "sampling", "again"),
    [
        (None, PROMPTS, Sampling(20), False),
        (None, PROMPTS[SMALLER], Sampling(11), False),
        (None, PROMPTS, Sampling(20, stop_token_ids=(300, 77)), False),
        (other_weights, PROMPTS, Sampling(20), False),
        (at_another_address, PROMPTS, Sampling(20), True),
        (None, LARGER, Sampling(20), True),
        (None, PROMPTS, Sampling(70), True),
        (None, PROMPTS, Sampling(20, temperature=0.6), True),
        (None, PROMPTS, Sampling(20, top_k=9), True),
        (None, PROMPTS, Sampling(20, top_p=0.7), True),
        (None, PROMPTS, Sampling(20, min_new_tokens=4), True),
    ],
)
def test_the_next_rollout_replays_what_was_kept(captures, change, prompts, sampling, again):
    model = LanguageModel(tiny_model("llama", layers=3).double(), num_layers_unfrozen=1)
    options = {"keep_states": True, "whole_trunk": True}
    engine = engine_of(model, 2**24, **options)
    first = engine.generate(PROMPTS, Sampling(20), seeds=SEEDS)
    before = [first.logprobs.clone(), first.states.clone(), first.trunk_states.states.clone()]
    assert captures.number
    captures.number = 0
    if change is not None:
        change(model)
    seeds = torch.arange(len(prompts)) + 7
    found = engine.generate(prompts, sampling, seeds=seeds)
    assert bool(captures.number) is again
    fresh = engine_of(model, 0, cuda_graphs=False, **options)
    assert_same(found, fresh.generate(prompts, sampling, seeds=seeds))
    after = [first.logprobs, first.states, first.trunk_states.states]
    assert all(map(torch.equal, before, after)), "the first rollout's tensors were written to"


def test_fewer_slots_than_were_kept(captures):
    """The slots beyond run no further than a response may while prompts wait."""
    model = LanguageModel(tiny_model("llama").double())
    engine = engine_of(model, 2**24, eos_ids=list)
    engine.generate(PROMPTS, Sampling(20), seeds=SEEDS)
    engine.slots = 2
    found = engine.generate(PROMPTS, Sampling(20), seeds=SEEDS)
    fresh = engine_of(model, 0, eos_ids=list, slots=2, cuda_graphs=False)
    assert texts(found) == texts(fresh.generate(PROMPTS, Sampling(20), seeds=SEEDS))


def test_what_is_too_large_or_failed_or_closed_is_not_kept(captures):
    model = LanguageModel(tiny_model("llama"))

    def captured(engine):
        captures.number = 0
        engine.generate(PROMPTS, Sampling(20), seeds=SEEDS)
        return captures.number > 0

    engine = engine_of(model, 2**20)
    assert [captured(engine), captured(engine)] == [True, False]
    assert engine.kept._buffers.nbytes() < 2**20
    smaller = engine_of(model, engine.kept._buffers.nbytes() - 1)
    assert [captured(smaller), captured(smaller)] == [True, True]
    norm = model.model.model.norm.weight.data
    norm[3] = torch.nan
    with pytest.raises(FloatingPointError):
        captured(engine)
    norm[3] = 1.0
    assert [captured(engine), captured(engine)] == [True, False]
    engine.close()
    assert captured(engine)


def test_with_adapters_nothing_is_kept(captures):
    """Merging them changes what a step computes, and may leave all weights where they are."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    model = LanguageModel(adapted)
    engine = engine_of(model, 2**20)
    for step in range(2):
        captures.number = 0
        engine.generate(PROMPTS, Sampling(20), seeds=SEEDS)
        assert captures.number, step


@pytest.mark.parametrize("capture", [None, recorded_ops(CPU)])
def test_a_rollouts_cache_is_freed_with_it(monkeypatch, capture):
    """And not when Python next looks for circles of references."""
    caches = []
    original = buffers.SlotCache.__init__

    def noted(self, *args, **options):
        original(self, *args, **options)
        caches.append(weakref.ref(self))

    monkeypatch.setattr(buffers.SlotCache, "__init__", noted)
    model = LanguageModel(tiny_model("llama"))
    sample(model)
    caches.clear()
    gc.disable()
    try:
        sample(model, capture=capture)
        assert caches
        assert all(cache() is None for cache in caches)
    finally:
        gc.enable()
