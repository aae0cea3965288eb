"""decode: batched passes, log-probs, the ends of responses, and what a draw depends on."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.ops import sample_tokens
from ppo_fast.rollout import Rollout, Sampling, decode
from ppo_fast.rollout.speedups.slot_check import layers_can_be_fused

PROMPTS = [[5, 61, 7, 300, 12, 8], [44], [3, 2, 91, 250], [90, 90, 90]]
SEEDS = torch.tensor([11, 2**40 + 3, 0, -7])
# About one token in eight ends a response: responses of many lengths, some cut at the end.
EOS_IDS = list(range(40))
PAD_ID = 305

each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    model = LanguageModel(tiny_model("llama"))
    layers_can_be_fused(model)  # checked before the first rollout, in separate passes
    return model


def sample(
    model: LanguageModel,
    prompts: list[list[int]] = PROMPTS,
    seeds: torch.Tensor = SEEDS,
    *,
    eos_ids: list[int] = EOS_IDS,
    pad_id: int = PAD_ID,
    max_length: int = 8,
    **sampling: float,
) -> Rollout:
    settings = Sampling(max_length, **sampling)
    return decode(model, prompts, settings, seeds=seeds, eos_ids=eos_ids, pad_id=pad_id)


def responses(decoded: Rollout) -> list[list[int]]:
    tokens = decoded.tokens
    rows = zip(tokens.response_ids.tolist(), tokens.response_lengths.tolist(), strict=True)
    return [ids[:length] for ids, length in rows]


def logits_row_by_row(model: LanguageModel, decoded: Rollout) -> list[torch.Tensor]:
    """Return the float64 logits [length, V] of the response tokens, each row alone."""
    exact = copy.deepcopy(model.model).double()
    out = []
    for prompt, response in zip(PROMPTS, responses(decoded), strict=True):
        with torch.no_grad():
            logits = exact(torch.tensor([prompt + response])).logits[0]
        out.append(logits[len(prompt) - 1 : -1])
    return out


@each_family
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_are_those_of_a_full_forward(family, temperature):
    model = LanguageModel(tiny_model(family))
    decoded = sample(model, temperature=temperature)
    assert len(set(decoded.tokens.response_lengths.tolist())) > 1
    for b, logits in enumerate(logits_row_by_row(model, decoded)):
        ids = torch.tensor(responses(decoded)[b])
        expected = (logits / temperature).log_softmax(dim=-1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(
            decoded.logprobs[b, : len(ids)].double(), expected, rtol=0, atol=2e-5
        )
    with torch.no_grad():
        update = model.logprobs(
            model.forward(decoded.tokens), decoded.tokens, temperature=temperature
        ).logprobs
    torch.testing.assert_close(decoded.logprobs, update, rtol=0, atol=2e-5)
    assert decoded.logprobs.dtype == torch.float32


def test_each_token_is_the_draw_of_its_sequences_seed_and_its_position(llama):
    decoded = sample(llama, temperature=0.7)
    for b, logits in enumerate(logits_row_by_row(llama, decoded)):
        places = torch.arange(len(logits))
        drawn = sample_tokens(logits, SEEDS[b].expand(len(logits)), places, temperature=0.7)
        assert drawn.tokens.tolist() == responses(decoded)[b]


def test_a_response_ends_with_its_first_eos(llama):
    decoded = sample(llama, max_length=5)
    ends = []
    for row, (response, finished) in enumerate(
        zip(responses(decoded), decoded.finished.tolist(), strict=True)
    ):
        assert not set(response[:-1]) & set(EOS_IDS), "nothing after an EOS is in the response"
        assert finished == (response[-1] in EOS_IDS), "the EOS is"
        assert finished or len(response) == 5
        after = slice(len(response), None)
        assert (decoded.tokens.response_ids[row, after] == PAD_ID).all()
        assert (decoded.logprobs[row, after] == 0).all()
        assert (decoded.sampling_logprobs[row, after] == 0).all()
        assert (decoded.logprobs[row, : len(response)] < 0).all()
        ends.append(finished)
    assert set(ends) == {True, False}, "this batch meets both endings"


def test_without_an_eos_responses_run_to_max_length(llama):
    decoded = sample(llama, eos_ids=[], max_length=7)
    assert decoded.tokens.response_lengths.tolist() == [7] * 4
    assert not decoded.finished.any()


def test_an_eos_as_the_last_allowed_token_has_finished(llama):
    endless = responses(sample(llama, eos_ids=[]))[0]
    assert endless[3] not in endless[:3]
    decoded = sample(llama, eos_ids=[endless[3]], max_length=4)
    assert decoded.tokens.response_lengths[0] == 4
    assert decoded.finished[0]


def test_pad_may_be_eos(llama):
    """A mask made from pad ids would drop the EOS, and tokens of the prompt with the same id."""
    endless = responses(sample(llama, eos_ids=[]))
    eos_ids = [endless[0][3], endless[2][1]]
    prompts = [[*prompt[:-1], eos_ids[0], prompt[-1]] for prompt in PROMPTS]
    for pad_id in eos_ids:
        same, other = (sample(llama, prompts, eos_ids=eos_ids, pad_id=p) for p in (pad_id, PAD_ID))
        assert responses(same) == responses(other)
        assert torch.equal(same.logprobs, other.logprobs)
        assert same.tokens.prompt_lengths.tolist() == [7, 2, 5, 4]
    ended = [endless[0][:4]]
    assert (
        responses(sample(llama, PROMPTS[:1], SEEDS[:1], eos_ids=eos_ids, pad_id=eos_ids[0]))
        == ended
    )


def test_a_sampled_pad_token_is_a_token_like_others(llama):
    endless = responses(sample(llama, eos_ids=[]))
    for pad_id in (endless[0][0], endless[1][-1]):
        assert responses(sample(llama, eos_ids=[], pad_id=pad_id)) == endless


@each_family
def test_a_row_does_not_depend_on_its_batch(family):
    """Decode a row alone, with other rows, in another order, and after more padding."""
    model = LanguageModel(tiny_model(family))
    together = responses(sample(model))
    for b, prompt in enumerate(PROMPTS):
        assert responses(sample(model, [prompt], SEEDS[b : b + 1])) == [together[b]]
    order = torch.tensor([2, 0, 3, 1])
    shuffled = responses(sample(model, [PROMPTS[i] for i in order], SEEDS[order]))
    assert shuffled == [together[i] for i in order]
    padded = [*PROMPTS, list(range(1, 31))]
    assert responses(sample(model, padded, torch.tensor([*SEEDS, 5])))[:4] == together


def test_the_same_seeds_give_the_same_tokens_and_other_seeds_others(llama):
    one, again = sample(llama, eos_ids=[]), sample(llama, eos_ids=[])
    assert torch.equal(one.tokens.response_ids, again.tokens.response_ids)
    assert torch.equal(one.logprobs, again.logprobs)
    torch.manual_seed(99)
    assert responses(sample(llama, eos_ids=[])) == responses(one), "no global random state"
    other = sample(llama, seeds=SEEDS + 1, eos_ids=[])
    assert all(a != b for a, b in zip(responses(one), responses(other), strict=True))
    equal_prompts = sample(llama, [[5, 6]] * 4, eos_ids=[])
    assert len(set(map(tuple, responses(equal_prompts)))) == 4


def test_one_prompt_of_one_token(llama):
    decoded = sample(llama, [[44]], SEEDS[1:2], eos_ids=[], max_length=1)
    assert decoded.tokens.response_ids.shape == (1, 1)
    assert responses(decoded)[0] == responses(sample(llama, eos_ids=[]))[1][:1]


def passes(model: LanguageModel, **arguments) -> tuple[list[torch.Size], Rollout]:
    """Return the shapes of the ids that the body was called with, and the rollout."""
    shapes: list[torch.Size] = []

    def record(module, args, kwargs):
        shapes.append(kwargs["input_ids"].shape)

    handle = model.body.register_forward_pre_hook(record, with_kwargs=True)
    decoded = sample(model, **arguments)
    handle.remove()
    return shapes, decoded


def test_all_prompts_decode_in_one_pass_per_token(llama):
    shapes, decoded = passes(llama, eos_ids=[], max_length=9)
    assert shapes == [(sum(map(len, PROMPTS)), 1), *[(4, 1)] * 8]
    assert decoded.tokens.response_ids.shape == (4, 9)


def test_decoding_stops_with_the_last_response(llama):
    shapes, decoded = passes(llama, max_length=100)
    longest = int(decoded.tokens.response_lengths.max())
    assert 1 < longest < 100
    assert len(shapes) == longest == decoded.tokens.response_ids.shape[1]
    assert decoded.finished.all()
    shapes, decoded = passes(llama, eos_ids=list(range(VOCAB_SIZE)), max_length=100)
    assert shapes == [(sum(map(len, PROMPTS)), 1)]
    assert decoded.tokens.response_lengths.tolist() == [1] * 4


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3}])
def test_every_sampler_is_greedy_in_the_limit(llama, sampling):
    decoded = sample(llama, eos_ids=[], **sampling)
    for response, logits in zip(responses(decoded), logits_row_by_row(llama, decoded), strict=True):
        assert response == logits.argmax(dim=-1).tolist()


def test_logprobs_are_the_models_and_sampling_logprobs_those_of_the_truncated_draw(llama):
    decoded = sample(llama, eos_ids=[], top_k=5, temperature=0.7)
    for b, logits in enumerate(logits_row_by_row(llama, decoded)):
        ids = torch.tensor(responses(decoded)[b])[:, None]
        scaled = logits / 0.7
        fifth = scaled.topk(5).values[:, -1:]
        kept = scaled.masked_fill(scaled < fifth, -math.inf)
        assert (scaled.gather(1, ids) >= fifth).all()
        for found, expected in (
            (decoded.logprobs, scaled.log_softmax(dim=-1)),
            (decoded.sampling_logprobs, kept.log_softmax(dim=-1)),
        ):
            torch.testing.assert_close(
                found[b].double(), expected.gather(1, ids)[:, 0], rtol=0, atol=2e-5
            )
    assert (decoded.sampling_logprobs > decoded.logprobs + 1e-3).all()


def test_without_truncation_sampling_logprobs_equal_logprobs(llama):
    decoded = sample(llama, temperature=0.7)
    assert torch.equal(decoded.logprobs, decoded.sampling_logprobs)


def test_nothing_is_kept_for_a_backward(llama):
    decoded = sample(llama)
    assert all(p.requires_grad for p in llama.model.parameters())
    assert not decoded.logprobs.requires_grad


def test_the_ordinary_path_draws_the_same_tokens(llama):
    ordinary = LanguageModel(llama.model)
    ordinary.fused = False
    assert responses(sample(ordinary)) == responses(sample(llama))


@each_family
@pytest.mark.parametrize("fused", [True, False])
def test_the_trunk_is_recorded_while_decoding(family, fused):
    """Trunk states are recorded for every token but the last: log-probs need no others."""
    model = LanguageModel(tiny_model(family, layers=3), num_layers_unfrozen=1)
    model.fused = fused
    decoded = sample(model)
    tokens, trunk_states = decoded.tokens, decoded.trunk_states
    assert trunk_states.states.shape == (len(tokens.packing), 64)
    expected = model.compute_trunk_states(tokens).states
    expected[trunk_states.response_first + tokens.response_lengths - 1] = 0
    torch.testing.assert_close(trunk_states.states, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        found, expected = (
            model.logprobs(model.forward(tokens, below), tokens, temperature=1.0).logprobs
            for below in (trunk_states, None)
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert not any(module._forward_pre_hooks for module in model.model.modules())


def test_without_a_trunk_nothing_is_recorded(llama):
    assert sample(llama).trunk_states is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_length", 0),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
    ],
)
def test_sampling_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}: got .*expected "):
        Sampling(**({"max_length": 3} | {name: value}))


def test_truncates_says_whether_draws_come_from_another_distribution():
    assert not Sampling(3, temperature=0.5).truncates
    assert Sampling(3, top_k=2).truncates
    assert Sampling(3, top_p=0.9).truncates
