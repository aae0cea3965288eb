"""The contract of every engine, and the trainer with another engine than its own."""

from __future__ import annotations

import pytest
import torch
from tiny_models import EOS_ID, PAD_ID, tiny_model
from tiny_trainer import PROMPTS, tiny_trainer
from transformers import ContinuousBatchingConfig

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.transformers_internals import why_no_continuous_batching
from ppo_fast.rollout import LocalEngine, Rollout, Sampling, TransformersEngine

IDS = [[5, 61, 7], [44], [3, 2, 91, 250], [5, 61, 7]]
SEEDS = torch.arange(4)
# About one token in six ends a response.
ENDS = list(range(50))


def local(model, eos_ids=()):
    return LocalEngine(LanguageModel(model), eos_ids=lambda: list(eos_ids), pad_id=PAD_ID)


# By default its cache takes most of the machine's memory, and a minute to fill.
SMALL = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)


def of_transformers(model, eos_ids=()):
    if (reason := why_no_continuous_batching()) is not None:
        pytest.skip(reason)
    return TransformersEngine(model, eos_ids=list(eos_ids), pad_id=PAD_ID, config=SMALL)


needs_seeds = pytest.mark.skipif(not hasattr(SMALL, "seed"), reason="generate_batch has no seed")
each_engine = pytest.mark.parametrize(
    "make", [local, pytest.param(of_transformers, marks=needs_seeds)]
)


def responses(rollout):
    tokens = rollout.tokens
    rows = zip(tokens.response_ids.tolist(), tokens.response_lengths.tolist(), strict=True)
    return [ids[:length] for ids, length in rows]


@each_engine
def test_greedy_tokens_are_the_models(make):
    model = tiny_model("llama")
    engine = make(model)
    rollout = engine.generate(IDS, Sampling(6, top_k=1), seeds=SEEDS)
    for prompt, response in zip(IDS, responses(rollout), strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        assert response == logits.argmax(dim=-1).tolist()
    engine.close()


@pytest.mark.slow
@each_engine
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"top_k": 20}, {"top_p": 0.8}])
def test_sampling_logprobs_are_of_the_distribution_drawn_from(make, sampling):
    model = tiny_model("llama")
    sampling = Sampling(6, **sampling)
    rollout = make(model).generate(IDS, sampling, seeds=SEEDS)
    assert isinstance(rollout, Rollout)
    assert rollout.sampling == sampling
    for row, (prompt, response) in enumerate(zip(IDS, responses(rollout), strict=True)):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logits = logits.double() / sampling.temperature
        if sampling.top_k:
            logits[logits < logits.topk(sampling.top_k).values[:, -1:]] = -torch.inf
        if sampling.top_p < 1:
            p, order = logits.softmax(-1).sort(descending=True)
            out = (p.cumsum(-1) - p >= sampling.top_p).gather(1, order.argsort(-1))
            logits[out] = -torch.inf
        expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        found = rollout.sampling_logprobs[row, : len(response)]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        assert (rollout.sampling_logprobs[row, len(response) :] == 0).all()


@each_engine
def test_a_response_ends_with_its_first_eos(make):
    rollout = make(tiny_model("llama"), ENDS).generate(IDS, Sampling(8), seeds=SEEDS)
    for response, finished in zip(responses(rollout), rollout.finished.tolist(), strict=True):
        assert not set(response[:-1]) & set(ENDS)
        assert finished == (response[-1] in ENDS)
        assert finished or len(response) == 8
    assert rollout.tokens.prompt_lengths.tolist() == [3, 1, 4, 3]


@each_engine
def test_stop_token_ids_end_a_response(make):
    engine = make(tiny_model("llama"))
    rollout = engine.generate(IDS, Sampling(8, stop_token_ids=tuple(ENDS)), seeds=SEEDS)
    assert rollout.finished.any()
    for response, finished in zip(responses(rollout), rollout.finished.tolist(), strict=True):
        assert not set(response[:-1]) & set(ENDS)
        assert finished == (response[-1] in ENDS)


@pytest.mark.slow
@each_engine
def test_equal_seeds_give_equal_responses(make):
    model = tiny_model("llama")
    first, again, other = (
        responses(make(model).generate(IDS, Sampling(8), seeds=seeds))
        for seeds in (SEEDS, SEEDS, SEEDS + 9)
    )
    assert first == again
    assert first != other


@pytest.mark.slow
@each_engine
def test_weights_are_synchronised(make):
    model = tiny_model("llama")
    engine = make(model)
    engine.generate(IDS, Sampling(3, top_k=1), seeds=SEEDS)
    with torch.no_grad():
        model.model.norm.weight.mul_(-1)
    engine.sync_weights(model)
    expected = make(model).generate(IDS, Sampling(3, top_k=1), seeds=SEEDS)
    found = engine.generate(IDS, Sampling(3, top_k=1), seeds=SEEDS)
    assert responses(found) == responses(expected)


@needs_seeds
def test_a_copy_takes_the_policys_weights():
    policy, copy = tiny_model("llama", seed=3), tiny_model("llama")
    engine = of_transformers(copy)
    engine.sync_weights(policy)
    found = engine.generate(IDS, Sampling(5, top_k=1), seeds=SEEDS)
    expected = local(policy).generate(IDS, Sampling(5, top_k=1), seeds=SEEDS)
    assert responses(found) == responses(expected)


def test_a_local_engine_has_one_model():
    with pytest.raises(ValueError, match="the one that this LocalEngine was made with"):
        local(tiny_model("llama")).sync_weights(tiny_model("llama"))


@needs_seeds
@pytest.mark.parametrize("option", [{"min_new_tokens": 2}, {"stop_strings": ("x",)}])
def test_what_transformers_cannot_do_is_refused(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}: TransformersEngine does not"):
        of_transformers(tiny_model("llama")).generate(IDS, Sampling(3, **option), seeds=SEEDS)


@pytest.mark.skipif(hasattr(SMALL, "seed"), reason="generate_batch has a seed")
def test_a_transformers_without_seeds_is_refused():
    with pytest.raises(RuntimeError, match="TransformersEngine needs transformers"):
        of_transformers(tiny_model("llama"))


def test_a_model_without_generate_batch_is_refused():
    with pytest.raises(TypeError, match="Linear has no generate_batch"):
        of_transformers(torch.nn.Linear(2, 2))


class Recorded:
    """An engine that returns tokens and sampling log-probs only, as a remote one would."""

    def __init__(self, engine):
        self.engine, self.synced = engine, 0

    def generate(self, prompt_ids, sampling, *, seeds):
        rollout = self.engine.generate(prompt_ids, sampling, seeds=seeds)
        return Rollout(
            rollout.tokens, None, rollout.sampling_logprobs, rollout.finished, rollout.sampling
        )

    def sync_weights(self, model):
        self.synced += 1

    def close(self):
        pass


@pytest.mark.parametrize("critic", ["head", "baseline"])
@pytest.mark.parametrize("k", [None, 1])
def test_a_trainer_with_another_engine_learns_the_same(critic, k):
    """Old log-probs, states and trunk states are computed where the engine does not return them."""
    own, other = (
        tiny_trainer(critic=critic, num_layers_unfrozen=k, learning_rate=1e-3) for _ in range(2)
    )
    other.engine = Recorded(other.engine)
    for step in range(2):
        expected, found = own.train_step(PROMPTS), other.train_step(PROMPTS)
        for name in ("policy_loss", "value_loss", "kl_divergence", "mean_reward"):
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
        assert other.engine.synced == step + 1
    assert own.tokenizer.eos_token_id == EOS_ID
