"""Rollouts with slots: the number of slots changes no text, and no token is computed twice."""

from __future__ import annotations

import resource

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from tiny_rollouts import PROMPTS, sample, texts

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.rollout import Sampling, decode


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_in_float64_a_rollout_depends_on_seeds_alone(family):
    """It does not depend on slots, order, batch, or on the number of prompts in one pass."""
    model = LanguageModel(tiny_model(family, layers=3).double())
    expected = sample(model)
    assert len(set(expected.tokens.response_lengths.tolist())) > 3
    for slots in (1, 2, 3, 5):
        found = sample(model, slots=slots, max_prompt_tokens=5 + slots)
        assert texts(found) == texts(expected)
        assert found.finished.tolist() == expected.finished.tolist()
        torch.testing.assert_close(found.logprobs, expected.logprobs)
        torch.testing.assert_close(found.sampling_logprobs, expected.sampling_logprobs)
    order = [6, 2, 0, 7, 1, 5, 4, 3]
    for slots in (None, 3):
        assert texts(sample(model, order, slots=slots)) == [texts(expected)[i] for i in order]
    for i in range(len(PROMPTS)):
        assert texts(sample(model, [i])) == [texts(expected)[i]]


def test_states_and_trunk_are_kept_by_sequence():
    model = LanguageModel(tiny_model("llama", layers=3).double(), num_layers_unfrozen=1)
    whole = sample(model, keep_states=True)
    for slots in (1, 3):
        found = sample(model, slots=slots, keep_states=True)
        torch.testing.assert_close(found.trunk_states.states, whole.trunk_states.states)
        torch.testing.assert_close(found.states, whole.states)
    tokens = whole.tokens
    expected = model.forward(tokens).states
    torch.testing.assert_close(
        whole.states, expected.masked_fill(~tokens.response_mask[..., None], 0)
    )


def count_tokens(model: LanguageModel) -> list[int]:
    """Return a list that gets the rows times tokens of every pass."""
    counts: list[int] = []
    model.body.get_input_embeddings().register_forward_hook(
        lambda _, args, __: counts.append(args[0].numel())
    )
    return counts


@pytest.mark.parametrize("slots", [1, 3, None])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_cost_follows_the_tokens_that_are_produced(family, slots):
    """Lengths are skewed: no slot computes after its response has ended, or waits for another."""
    model = LanguageModel(tiny_model(family))
    sample(model)  # which checks the model once
    counts = count_tokens(model)
    lengths = [20, 1, 3, 2, 20, 1, 7, 2]
    rollout = sample(model, slots=slots, eos_ids=[], max_lengths=lengths)
    assert rollout.tokens.response_lengths.tolist() == lengths
    # [44] is asked for three times and computed once; the last token of a response never is
    prompts = sum(len(p) for p in PROMPTS) - 2
    # of the prompts that start together; fused layers need none
    padding = {1: 0, 3: 7, None: 19}[slots] if family == "gpt_neox" else 0
    assert sum(counts) == prompts + padding + sum(lengths) - len(lengths)


def test_several_samples_of_a_prompt_share_one_pass():
    model = LanguageModel(tiny_model("llama"))
    sample(model)
    counts = count_tokens(model)
    prompts = [[7] * 30, [8] * 30] * 4
    for slots in (8, 3):
        counts.clear()
        decode(
            model, prompts, Sampling(5), seeds=torch.arange(8), eos_ids=[], pad_id=0, slots=slots
        )
        assert sum(counts) == 60 + 8 * 4
        assert max(counts) <= 60


def test_in_float32_few_tokens_depend_on_the_batch(record_property):
    model = LanguageModel(tiny_model("llama", layers=3))
    prompts = [[i, 3, 5] for i in range(50, 90)]
    settings = {"eos_ids": [], "pad_id": 0}

    def run(slots: int | None) -> torch.Tensor:
        seeds = torch.arange(len(prompts))
        return decode(
            model, prompts, Sampling(25), seeds=seeds, slots=slots, **settings
        ).tokens.response_ids

    equal = (run(None) == run(7)).float().mean().item()
    record_property("share of equal tokens", equal)
    assert equal > 0.9


def test_memory_does_not_grow():
    model = LanguageModel(tiny_model("llama"))
    for _ in range(10):
        sample(model, slots=3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(50):
        sample(model, slots=3)
    # KiB; a cache of one rollout is 4 slots x 26 tokens x 2 layers x 256 bytes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 1024


def test_nan_logits_are_an_error():
    model = tiny_model("llama")
    language_model = LanguageModel(model)
    sample(language_model)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match="policy_model: its logits were NaN"):
        sample(language_model)
