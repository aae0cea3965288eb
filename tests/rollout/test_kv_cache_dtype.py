"""Keys and values of rollouts in bfloat16: who gets them, what they take, and who refuses."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer
from tiny_rollouts import PROMPTS, sample, texts
from tiny_trainer import count_letters, no_model_runs, one_line, tiny_trainer

from ppo_fast import PPO, PPOConfig
from ppo_fast.models.checks import check_kv_cache_dtype
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.rollout.local_engine import LocalEngine
from ppo_fast.rollout.prompts import Prompts
from ppo_fast.rollout.slots import SlotCache, step_arguments
from ppo_fast.rollout.speedups.fast_paths import fast_paths
from ppo_fast.rollout.speedups.fused_layers import fused_layers
from ppo_fast.rollout.speedups.slot_check import check_layers, layers_can_be_fused
from ppo_fast.rollout.speedups.step_forward import StepForward

BF16 = torch.bfloat16


def rounding(family="llama", *, layers=3):
    return LanguageModel(tiny_model(family, layers=layers), kv_cache_dtype=BF16)


def prompt_filled(model, fused):
    """Return a SlotCache with ``PROMPTS``, a slot each, and their lengths."""
    prompts = [tuple(prompt) for prompt in PROMPTS]
    cache = SlotCache(model.text_config, len(prompts), 8, dtype=model.kv_cache_dtype)
    computed = Prompts(model, prompts, 1 << 20, 0, [], fused=fused)
    computed.read(prompts, cache)
    for batch, rows, slots in computed.take(prompts):
        cache.fill(batch.keys_values, torch.tensor(rows), torch.tensor(slots))
    return cache, torch.tensor([len(prompt) for prompt in prompts])


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@torch.no_grad()
def test_a_cache_in_bfloat16_takes_half_the_bytes(family):
    fused = family == "llama"
    model = rounding(family)
    with fused_layers(model) as layers:
        assert len(layers) == (3 if fused else 0)
        rounded, _ = prompt_filled(model, fused)
        model.kv_cache_dtype = None
        exact, _ = prompt_filled(model, fused)
    assert 2 * rounded.nbytes() == exact.nbytes() > 0
    near = {"atol": 0.03, "rtol": 0.03}
    for ours, theirs in zip(rounded.layers, exact.layers, strict=True):
        assert ours.keys.dtype == ours.values.dtype == BF16
        torch.testing.assert_close(ours.keys.float(), theirs.keys, **near)
        torch.testing.assert_close(ours.values.float(), theirs.values, **near)
    assert torch.equal(rounded.layers[0].keys, exact.layers[0].keys.to(BF16))


def test_layers_that_are_not_fused_read_rounded_numbers_in_their_own_dtype():
    layer = SlotCache(tiny_model().config, 2, 8, dtype=BF16).layers[0]
    states = torch.randn(2, 4, 5, 16)
    for found in layer.update(states, 2 * states):  # of prompts
        assert found.dtype == torch.float32
        assert torch.equal(found, found.bfloat16().float())
    assert torch.equal(layer.prompts[0], states.bfloat16())
    layer.cells, layer.longest = torch.tensor([0, 8]), 1
    keys, values = layer.update(states[:, :, :1], 2 * states[:, :, :1])  # of a step
    assert torch.equal(keys, states[:, :, :1].bfloat16().float())
    assert torch.equal(values, (2 * states[:, :, :1]).bfloat16().float())


@torch.no_grad()
def test_a_prompts_bits_are_those_of_steps():
    """Layers that are fused read rounded keys and values of a prompt as those of a response."""
    model = rounding()
    with fused_layers(model):
        cache, lengths = prompt_filled(model, True)
        steps = SlotCache(model.text_config, len(PROMPTS), 8, dtype=BF16)
        for t in range(int(lengths.max())):
            tokens = torch.tensor([(prompt + [0] * 8)[t] for prompt in PROMPTS])
            model.next(**step_arguments(model, steps, tokens, torch.full_like(lengths, t), t + 1))
    for ours, theirs in zip(cache.layers, steps.layers, strict=True):
        for slot, length in enumerate(lengths.tolist()):
            assert torch.equal(ours.keys[slot, :length], theirs.keys[slot, :length])
            assert torch.equal(ours.values[slot, :length], theirs.values[slot, :length])


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rollout_with_rounded_keys_is_near_the_exact_one(family, dtype):
    raw = tiny_model(family, layers=3).to(dtype)
    exact, rounded = LanguageModel(raw), LanguageModel(raw, kv_cache_dtype=BF16)
    assert check_layers(rounded) == check_layers(exact)
    expected, found = sample(exact), sample(rounded)
    firsts = [row[0] for row in texts(expected)]
    assert sum(row[0] == first for row, first in zip(texts(found), firsts, strict=True)) >= 7
    together = found.tokens.response_ids[:, :1] == expected.tokens.response_ids[:, :1]
    differences = (found.logprobs[:, :1] - expected.logprobs[:, :1])[together].abs()
    assert differences.max() < 0.1
    # the model's own layers in bfloat16 give keys in bfloat16
    rounds = dtype == torch.float32 or check_layers(rounded).number > 0
    assert (differences.max() > 0) == rounds


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_rows_do_not_depend_on_slots(family):
    model = rounding(family)
    expected = sample(model)
    for slots in (1, 3):
        found = sample(model, slots=slots)
        if layers_can_be_fused(model):
            assert texts(found) == texts(expected)
            assert torch.equal(found.logprobs, expected.logprobs)
        assert found.logprobs.isfinite().all()


def test_all_layers_are_fused_in_a_trainer_with_rounded_keys():
    trainer = tiny_trainer(critic="baseline", kv_cache_dtype="bfloat16")
    assert trainer.policy.kv_cache_dtype == BF16
    assert trainer.reference.kv_cache_dtype is None
    names = [path.name for path in fast_paths(trainer.policy) if path.in_force]
    assert "2 of 2 layers fused" in names


def test_rounding_that_changes_logits_too_much_is_an_error(monkeypatch):
    monkeypatch.setattr("ppo_fast.models.language_model.HALF_TOLERANCE", 1e-9)
    words = r"kv_cache_dtype: .* keys and values in bfloat16, logits differ by"
    with pytest.raises(ValueError, match=words) as error:
        sample(rounding())
    assert one_line(error)


def test_fused_layers_that_read_other_keys_are_not_used(monkeypatch):
    """A kernel that goes wrong with a rounded cache alone is found before it decodes."""
    own = StepForward._step

    def wrong(self, states, rows, cache):
        found = own(self, states, rows, cache)
        return found if cache.dtype is None else found + 1

    monkeypatch.setattr(StepForward, "_step", wrong)
    layers = check_layers(rounding())
    assert (layers.number, layers.failed) == (0, True)
    assert layers.why_not.startswith("with keys and values in bfloat16, logits differ by")
    assert check_layers(LanguageModel(tiny_model(layers=3))).number == 3


def ppo_of(model, **options):
    config = PPOConfig(critic="baseline", kv_cache_dtype="bfloat16")
    return PPO(model, tiny_tokenizer(), count_letters, device="cpu", config=config, **options)


def test_who_refuses_it():
    words = "kv_cache_dtype: got 'bfloat16' for LlamaForCausalLM in float64, expected None"
    with pytest.raises(ValueError, match=words) as error, no_model_runs():
        ppo_of(tiny_model().double())
    assert one_line(error)
    model = tiny_model()
    engine = LocalEngine(LanguageModel(model), eos_ids=list, pad_id=0)
    words = "kv_cache_dtype: got 'bfloat16' with a LocalEngine, which has a cache of its own"
    with pytest.raises(ValueError, match=words) as error, no_model_runs():
        ppo_of(model, engine=engine)
    assert one_line(error)


def test_off_the_cpu_steps_must_compute_in_bfloat16():
    model = tiny_model().to("meta")
    with pytest.raises(ValueError, match=r"'bfloat16' for .* computes in float32 on") as error:
        check_kv_cache_dtype(BF16, model, None)
    assert one_line(error)
    check_kv_cache_dtype(BF16, model, BF16)
    check_kv_cache_dtype(BF16, model.bfloat16(), None)
    check_kv_cache_dtype(None, model.float(), None)
