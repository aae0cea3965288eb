"""Steps that are recorded and replayed draw what steps from Python do."""

from __future__ import annotations

import re
import warnings
from typing import ClassVar

import pytest
import torch
from recorded_ops import RecordedOps, as_on_a_gpu, recorded_ops
from tiny_models import FAMILIES, PAD_ID, tiny_model
from tiny_rollouts import EOS_IDS, PROMPTS, SEEDS, sample, texts
from tiny_trainer import PROMPTS as TEXTS
from tiny_trainer import tiny_trainer

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.rollout import LocalEngine, Sampling, decode
from ppo_fast.rollout.speedups import cuda_graph_check, cuda_graphs
from ppo_fast.rollout.speedups.cuda_graphs import Steps, as_it_is, never_waiting, row_bucket

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_a_gpu():
    with as_on_a_gpu():
        yield


@pytest.fixture
def cpu_captures(monkeypatch):
    """Pretends that graphs were a CPU's."""
    monkeypatch.setitem(cuda_graph_check.CAPTURES, "cpu", recorded_ops)


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


@pytest.mark.slow
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
    torch.testing.assert_close(found.trunk_states.states, expected.trunk_states.states)
    torch.testing.assert_close(found.states, expected.states)


def test_most_steps_are_replayed():
    """A shape runs once, is recorded once, and the model's Python runs no more."""
    model = LanguageModel(tiny_model("llama"))
    passes: list[int] = []
    model.body.register_forward_pre_hook(
        lambda _, __, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    prompts, seeds = [[i, 3] for i in range(20)], torch.arange(20)
    lengths = [30] * 10 + [40] * 2 + [10] * 8
    options = {"seeds": seeds, "eos_ids": [], "pad_id": 0, "max_lengths": lengths}
    decode(model, prompts, Sampling(40), **options, capture=recorded_ops(CPU))
    # the prompts; then twice each: 20 rows, 12, and 2
    assert passes == [20, 20, 20, 16, 16, 8, 8]


def test_buckets():
    few = {1: 8, 8: 8, 9: 16, 17: 32, 33: 64, 64: 64}
    many = {65: 96, 97: 128, 128: 128, 129: 192, 300: 384}
    assert {n: row_bucket(n) for n in few | many} == few | many
    assert all(n <= row_bucket(n) < 1.5 * n for n in range(65, 3000))
    seen: list[tuple[int, int]] = []
    steps = Steps(700)
    for rows, columns in ((9, 1), (12, 256), (3, 257), (7, 513), (12, 700)):
        steps.run(lambda *shape: seen.append(shape), rows, columns, as_it_is, most_rows=12)
    assert seen == [(12, 256), (12, 256), (8, 512), (8, 700), (12, 700)]


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
    assert cuda_graph_check.why_not(model, recorded_ops) is None
    assert cuda_graph_check.why_not(model, forgetful) == "the replayed steps drew other tokens"
    assert cuda_graph_check.why_not(model, refusing) == "CUDA error: operation not permitted"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda_graph_check.capture_for(model) is not None
        monkeypatch.setitem(cuda_graph_check.CAPTURES, "cpu", refusing)
        assert cuda_graph_check.capture_for(model) is not None  # what was found out is remembered

    other = LanguageModel(tiny_model("llama"))
    with pytest.warns(
        UserWarning, match="without CUDA graphs: CUDA error: operation not permitted"
    ):
        assert cuda_graph_check.capture_for(other) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda_graph_check.capture_for(other) is None


def test_a_step_that_waits_for_the_device_is_named_before_any_capture(monkeypatch, cpu_captures):
    """torch's debug mode for synchronization, here with a CPU's tensors in the place of a GPU's."""
    modes = ["default"]
    item = torch.Tensor.item

    def guarded(tensor):
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nmore")
        return item(tensor)

    monkeypatch.setattr(torch.Tensor, "item", guarded)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setitem(cuda_graph_check.REHEARSALS, "cpu", never_waiting)
    model, captured = LanguageModel(tiny_model("llama")), []

    def counting(device):
        captured.append(device)
        return recorded_ops(device)

    assert cuda_graph_check.why_not(model, counting) is None
    assert captured
    captured.clear()
    waits = model.body.register_forward_pre_hook(
        lambda _, __, kwargs: kwargs["input_ids"].sum().item() if modes[-1] == "error" else None,
        with_kwargs=True,
    )
    reason = cuda_graph_check.why_not(model, counting)
    waits.remove()
    assert re.fullmatch(
        r"called a synchronizing CUDA operation, in .*test_cuda_graphs\.py:\d+ \(.*", reason
    )
    assert not captured
    assert modes[-1] == "default"


class FakeGraph:
    """A CUDA graph without CUDA."""

    def __init__(self, refuses=False):
        self.calls, self.refuses = [], refuses

    def capture_begin(self, **options):
        self.calls.append("begin")

    def capture_end(self):
        self.calls.append("end")
        if self.refuses:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize("fails_in", ["step", "capture_end"])
def test_a_failed_capture_is_cleaned_up_and_its_cause_is_raised(monkeypatch, fails_in):
    graph, ended = FakeGraph(refuses=True), []

    class FakeGenerator:
        states: ClassVar[list[str]] = []

        def clone_state(self):
            return "not capturing"

        def graphsafe_set_state(self, state):
            self.states.append(state)

    monkeypatch.setattr(torch.cuda, "default_generators", (FakeGenerator(),))
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda *where: ended.append(where), raising=False
    )
    expected = "the step's own" if fails_in == "step" else "a previous error"
    with pytest.raises(RuntimeError, match=expected):  # noqa: SIM117, PT012
        with cuda_graphs._recording(graph, (0, 1), torch.device("cuda", 0)):
            if fails_in == "step":
                raise RuntimeError("the step's own")
    assert graph.calls[0] == "begin"
    assert ended == [(0, (0, 1))]
    assert FakeGenerator.states == ["not capturing"]


def test_a_capture_that_works_is_ended_once():
    graph = FakeGraph()
    with cuda_graphs._recording(graph, (0, 1), torch.device("cuda", 0)):
        pass
    assert graph.calls == ["begin", "end"]


def test_a_model_on_the_cpu_is_not_captured():
    assert cuda_graph_check.capture_for(LanguageModel(tiny_model("llama"))) is None


def test_the_engine_captures_unless_told_otherwise(monkeypatch, cpu_captures):
    model, captured = LanguageModel(tiny_model("llama").double()), []

    def counting(device):
        captured.append(device)
        return recorded_ops(device)

    monkeypatch.setitem(cuda_graph_check.CAPTURES, "cpu", counting)
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
