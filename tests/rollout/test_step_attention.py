"""Decoding steps with ``decode_attention``, as on a GPU, draw the same tokens as other steps."""

from __future__ import annotations

import pytest
import torch
from recorded_ops import as_on_a_gpu, recorded_ops
from tiny_models import FAMILIES, tiny_config, tiny_model
from tiny_rollouts import sample, texts
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.precision import WeightCopies
from ppo_fast.rollout import slots
from ppo_fast.rollout.speedups import slot_check, step_attention
from ppo_fast.rollout.speedups.cuda_graphs import as_it_is

CPU = torch.device("cpu")
FLASH = "flash_attention_of_these_tests"


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(slot_check, "ATTENDING_DEVICES", {"cpu"})
    with as_on_a_gpu():
        yield


def mistral(window: int) -> LanguageModel:
    """Return a Mistral, all layers of which attend to the last ``window`` tokens only."""
    config = tiny_config("mistral", layers=3)
    config.sliding_window, config.num_key_value_heads = window, 2
    torch.manual_seed(0)
    return LanguageModel(AutoModelForCausalLM.from_config(config).double().eval())


def without_it(model, monkeypatch, **options):
    with monkeypatch.context() as patch:
        patch.setattr(slot_check, "ATTENDING_DEVICES", set())
        return sample(model, **options)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [None, 3])
@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
def test_steps_draw_the_same(family, slots, monkeypatch):
    model = (
        mistral(window=4)
        if family == "mistral"
        else LanguageModel(tiny_model(family, layers=3).double())
    )
    expected = without_it(model, monkeypatch, slots=slots)
    assert slot_check.steps_can_attend(model) == (family != "gemma2")  # which caps its scores
    for capture in (None, as_it_is, recorded_ops(CPU)):
        found = sample(model, slots=slots, capture=capture)
        assert texts(found) == texts(expected)
        torch.testing.assert_close(found.logprobs, expected.logprobs)


def test_a_step_makes_no_mask_and_no_copy_of_keys(monkeypatch):
    model = LanguageModel(tiny_model("llama", layers=3).double())
    assert slot_check.steps_can_attend(model)
    monkeypatch.setattr(slots, "step_mask", None)
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, *args, **kwargs: (calls.append(q.shape[2]), attention(q, *args, **kwargs))[1],
    )
    sample(model)
    assert 1 not in calls, "prompts alone"


def test_one_recording_is_used_for_every_length():
    model = LanguageModel(tiny_model("llama"))
    assert slot_check.steps_can_attend(model)
    shapes = []

    def counting(step):
        shapes.append(step)
        step()
        return step

    sample(model, slots=2, capture=counting)
    assert len(shapes) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_models_own_attention_is_restored(fails):
    model = LanguageModel(tiny_model("llama"))
    before = model.model.config._attn_implementation

    def failing(step):
        raise OSError("no")

    if fails:
        with pytest.raises(OSError, match="no"):
            sample(model, capture=failing)
    else:
        sample(model)
    assert model.model.config._attn_implementation == before


@pytest.mark.parametrize("attends", [True, False])
def test_a_model_loaded_with_flash_attention_decodes(attends, monkeypatch):
    """Flash attention accepts only masks of two dimensions, those of padding."""
    model = LanguageModel(tiny_model("llama").double())
    expected = without_it(model, monkeypatch)

    def flash(module, query, key, value, attention_mask, **options):
        assert attention_mask is None or attention_mask.dim() == 2
        return AttentionInterface()["sdpa"](module, query, key, value, None, **options)

    AttentionInterface.register(FLASH, flash)
    AttentionMaskInterface.register(FLASH, lambda *_, **__: None)
    other = LanguageModel(tiny_model("llama").double())
    other.model.config._attn_implementation = FLASH
    monkeypatch.setattr(slot_check, "ATTENDING_DEVICES", {"cpu"} if attends else set())
    found = sample(other)
    assert texts(found) == texts(expected)
    assert other.model.config._attn_implementation == FLASH


def test_steps_under_autocast_attend_in_its_dtype(monkeypatch):
    """As models decode whose float32 buffers do not fit copies of their weights."""
    dtypes, own = set(), step_attention.decode_attention

    def watched(query, keys, values, *others, **options):
        dtypes.update(x.dtype for x in (query, keys, values))
        return own(query, keys, values, *others, **options)

    monkeypatch.setattr(step_attention, "decode_attention", watched)
    model = LanguageModel(tiny_model("llama", layers=3), compute_dtype=torch.bfloat16)
    with WeightCopies(torch.bfloat16, autocast=True).in_use(model.model):
        found = sample(model)
        expected = without_it(model, monkeypatch)
    assert dtypes == {torch.bfloat16}
    first = (found.logprobs - expected.logprobs)[:, 0].abs().max()  # later tokens may differ
    assert first <= 0.05


def test_an_unsupported_model_is_refused_with_the_reason():
    model = LanguageModel(tiny_model("gemma2"))
    assert not slot_check.steps_can_attend(model)
    assert "softcap" in slot_check._attending[model]


def test_attention_with_wrong_numbers_is_not_used(monkeypatch):
    monkeypatch.setattr(step_attention, "decode_attention", lambda query, *_, **__: query)
    assert not slot_check.steps_can_attend(LanguageModel(tiny_model("llama")))
