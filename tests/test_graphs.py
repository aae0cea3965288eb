"""Steps that are recorded and replayed draw what steps from Python do."""

from __future__ import annotations

import warnings

import pytest
import torch
from recorded_ops import RecordedOps, as_on_a_gpu, recorded_ops
from tiny_models import FAMILIES, PAD_ID, tiny_model
from tiny_rollouts import EOS_IDS, PROMPTS, SEEDS, sample, texts
from tiny_trainer import PROMPTS as TEXTS
from tiny_trainer import tiny_trainer

from ppo_fast.language_model import LanguageModel
from ppo_fast.rollout import LocalEngine, Sampling, decode, graph_check
from ppo_fast.rollout.graphs import Steps, as_it_is, row_bucket

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_a_gpu():
    with as_on_a_gpu():
        yield


@pytest.fixture
def cpu_captures(monkeypatch):
    """Pretends that graphs were a CPU's."""
    monkeypatch.setitem(graph_check.CAPTURES, "cpu", recorded_ops)


def test_a_recording_holds_numbers_as_they_were():
    """What this file relies on: a number from Python, unlike a tensor's, is not read again."""
    x, y, number = torch.ones(3), torch.zeros(3), 2.0
    with RecordedOps() as ops:
        y += number * x[1:].sum()
    number = 100.0
    x.fill_(5.0)
    ops.replay()
    assert y.tolist() == [24.0] * 3
    for waits in (lambda: x.sum().item(), lambda: x[x > 1], lambda: torch.tensor([1.0])):
        with pytest.raises(RuntimeError, match="capturing"), RecordedOps():
            waits()


@pytest.mark.parametrize("slots", [None, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_draw_the_same(family, slots):
    model = LanguageModel(tiny_model(family, layers=3).double())
    expected = sample(model, slots=slots)
    for capture in (as_it_is, recorded_ops(CPU)):
        found = sample(model, slots=slots, capture=capture)
        assert texts(found) == texts(expected)
        assert found.finished.tolist() == expected.finished.tolist()
        torch.testing.assert_close(found.logprobs, expected.logprobs)
        torch.testing.assert_close(found.sampling_logprobs, expected.sampling_logprobs)


@pytest.mark.parametrize(
    "options", [{"top_k": 9}, {"top_p": 0.7}, {"min_new_tokens": 6, "stop_token_ids": (3, 80)}]
)
def test_ways_to_draw(options):
    model = LanguageModel(tiny_model("qwen2").double())
    settings = {"seeds": SEEDS, "eos_ids": EOS_IDS, "pad_id": PAD_ID, "slots": 5}
    expected = decode(model, PROMPTS, Sampling(20, **options), **settings)
    found = decode(model, PROMPTS, Sampling(20, **options), **settings, capture=recorded_ops(CPU))
    assert texts(found) == texts(expected)
    torch.testing.assert_close(found.logprobs, expected.logprobs)
    torch.testing.assert_close(found.sampling_logprobs, expected.sampling_logprobs)


def test_states_and_trunk_are_kept():
    model = LanguageModel(tiny_model("llama", layers=3).double(), num_layers_unfrozen=1)
    expected = sample(model, slots=3, keep_states=True)
    found = sample(model, slots=3, keep_states=True, capture=recorded_ops(CPU))
    torch.testing.assert_close(found.trunk.states, expected.trunk.states)
    torch.testing.assert_close(found.states, expected.states)


def test_most_steps_are_replayed():
    """A shape runs once, is recorded once, and the model's Python runs no more."""
    model = LanguageModel(tiny_model("llama"))
    passes: list[int] = []
    model.body.register_forward_pre_hook(
        lambda _, __, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    prompts, seeds = [[i, 3] for i in range(6)], torch.arange(6)
    options = {"seeds": seeds, "eos_ids": [], "pad_id": 0, "max_lengths": [30, 30, 40, 10, 10, 3]}
    decode(model, prompts, Sampling(40), **options, capture=recorded_ops(CPU))
    # the prompts; then twice each, six rows to five, four to two, and one
    assert passes == [6, 6, 6, 4, 4, 1, 1]


def test_buckets():
    few = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 8: 8, 9: 16, 17: 24, 33: 40, 64: 64}
    many = {65: 80, 128: 128, 129: 160, 300: 320}
    assert {n: row_bucket(n) for n in few | many} == few | many
    assert all(n <= row_bucket(n) < 1.25 * n for n in range(33, 3000))
    seen: list[tuple[int, int]] = []
    steps = Steps(lambda *shape: seen.append(shape), 12, 700, as_it_is)
    for rows, columns in ((9, 1), (12, 256), (3, 257), (3, 513), (12, 700)):
        steps(rows, columns)
    assert seen == [(12, 256), (12, 256), (4, 512), (4, 700), (12, 700)]


def forgetful(device):
    """Replays everything but what is written in place."""

    def capture(step):
        with RecordedOps() as ops:
            step()
        ops.calls = [call for call in ops.calls if not call[0]._schema.is_mutable]
        return ops.replay

    return capture


def refusing(device):
    def capture(step):
        raise RuntimeError("CUDA error: operation not permitted\nsecond line")

    return capture


def test_graphs_are_checked_first(monkeypatch, cpu_captures):
    model = LanguageModel(tiny_model("llama"))
    assert graph_check.why_not(model, recorded_ops) is None
    assert graph_check.why_not(model, forgetful) == "the replayed steps drew other tokens"
    assert graph_check.why_not(model, refusing) == "CUDA error: operation not permitted"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert graph_check.capture_for(model) is not None
        monkeypatch.setitem(graph_check.CAPTURES, "cpu", refusing)
        assert graph_check.capture_for(model) is not None  # what was found out is remembered

    other = LanguageModel(tiny_model("llama"))
    with pytest.warns(
        UserWarning, match="without CUDA graphs: CUDA error: operation not permitted"
    ):
        assert graph_check.capture_for(other) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert graph_check.capture_for(other) is None


def test_a_model_on_the_cpu_is_not_captured():
    assert graph_check.capture_for(LanguageModel(tiny_model("llama"))) is None


def test_the_engine_captures_unless_told_otherwise(monkeypatch, cpu_captures):
    model, captured = LanguageModel(tiny_model("llama").double()), []

    def counting(device):
        captured.append(device)
        return recorded_ops(device)

    monkeypatch.setitem(graph_check.CAPTURES, "cpu", counting)
    responses = {}
    for on in (True, False):
        captured.clear()
        engine = LocalEngine(model, eos_ids=list, pad_id=PAD_ID, cuda_graphs=on)
        responses[on] = texts(engine.generate(PROMPTS, Sampling(12), seeds=SEEDS))
        assert bool(captured) is on
    assert responses[True] == responses[False]


@pytest.mark.parametrize("on", [True, False])
def test_the_trainer_says_whether_to_capture(cpu_captures, on):
    trainer = tiny_trainer(cuda_graphs=on)
    assert trainer.engine.cuda_graphs is on
    assert len(trainer.rollout(TEXTS).completions) == len(TEXTS)
