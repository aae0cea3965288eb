"""make_experience with models: the inputs of each, and what an experience does not depend on."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

from ppo_fast import PPOTrainer
from ppo_fast.config import PPOConfig
from ppo_fast.critics.baselines import Baseline
from ppo_fast.critics.critic import HeadCritic, ModelCritic
from ppo_fast.data.experience import Experience
from ppo_fast.data.tokens import Tokens
from ppo_fast.learning.make_experience import make_experience
from ppo_fast.models.heads import ValueHead, ValueModel
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.rollout import Rollout, Sampling, decode

PER_TOKEN = ("old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")
PROMPTS = [[5, 61, 7, 300], [44], [3, 2, 91], [17, 18]]
SCORES_OF_FOUR = torch.tensor([1.0, -2.0, 0.5, 3.0])
CONFIG = PPOConfig(kl_penalty=0.1, gamma=0.97)


def rollout_of(policy: LanguageModel, temperature: float = 0.7, **sampling: int) -> Rollout:
    settings = Sampling(6, temperature=temperature, **sampling)
    decoded = decode(policy, PROMPTS, settings, seeds=torch.arange(4), eos_ids=range(60), pad_id=0)
    assert len(set(decoded.tokens.response_lengths.tolist())) > 1
    texts = list("abcd")
    return replace(decoded, prompts=texts, completions=texts)


def critic_of(kind: str) -> object:
    torch.manual_seed(0)
    if kind == "head":
        head = ValueHead(64)
        torch.nn.init.normal_(head.linear.weight)
        return HeadCritic(head)
    if kind == "model":
        return ModelCritic(ValueModel(tiny_model("gpt2", seed=3), 64).eval(), max_tokens=10_000)
    return Baseline("baseline", CONFIG.gamma)


def experience_of(
    rollout: Rollout,
    critic: str = "head",
    family: str = "llama",
    *,
    k: int | None = None,
    seed: int | None = None,
    scores: torch.Tensor = SCORES_OF_FOUR,
    **changes,
) -> Experience:
    """Make an experience; ``seed`` gives the reference: the policy if they share a trunk."""
    seed = (7 if k is None else 0) if seed is None else seed
    return make_experience(
        rollout,
        scores,
        policy=LanguageModel(tiny_model(family, layers=3), num_layers_unfrozen=k),
        reference=LanguageModel(tiny_model(family, layers=3, seed=seed), num_layers_unfrozen=k),
        critic=critic_of(critic),
        config=replace(CONFIG, **changes),
    )


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    return rollout_of(LanguageModel(tiny_model("llama", layers=3)))


each_critic = pytest.mark.parametrize("critic", ["head", "model", "baseline"])


def assert_same(one: Experience, other: Experience) -> None:
    for name in (*PER_TOKEN, "scores"):
        torch.testing.assert_close(
            getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-4, msg=name
        )
    for name, value in one.metrics.items():
        assert other.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


@each_critic
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_policy_reference_and_critic_read_what_they_should(critic, temperature):
    """Compare with float64, each row alone: both models read the state before the token."""
    policy, reference = tiny_model("llama", layers=3), tiny_model("llama", layers=3, seed=7)
    rollout = rollout_of(LanguageModel(policy), temperature)
    experience = experience_of(rollout, critic)
    assert experience.temperature == temperature
    exact = {
        "old_logprobs": copy.deepcopy(policy).double(),
        "ref_logprobs": copy.deepcopy(reference).double(),
    }
    lengths = rollout.tokens.prompt_lengths.tolist()
    for b, (row, p) in enumerate(zip(rollout.tokens.sequences(), lengths, strict=True)):
        before, ids = slice(p - 1, len(row) - 1), row[p:]
        with torch.no_grad():
            for name, model in exact.items():
                table = (model(row[None]).logits[0, before] / temperature).log_softmax(dim=-1)
                expected = table.gather(1, ids[:, None])[:, 0]
                found = getattr(experience, name)[b, : len(ids)].double()
                torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
            if critic == "head":
                states = policy.model(row[None]).last_hidden_state[0, before]
                expected = critic_of("head").module(states)
            elif critic == "model":
                expected = critic_of("model").module(row[None])[0, before]
            else:
                scores = experience.scores
                left = torch.arange(len(ids) - 1, -1, -1)
                expected = (scores.sum() - scores[b]) / 3 * CONFIG.gamma**left
        torch.testing.assert_close(experience.values[b, : len(ids)], expected, rtol=1e-4, atol=1e-4)


@each_critic
@pytest.mark.parametrize("max_tokens", [1, 17, 10**6])
def test_max_tokens_changes_nothing_but_rounding(rollout, critic, max_tokens):
    assert_same(
        experience_of(rollout, critic, forward_batch_tokens=max_tokens),
        experience_of(rollout, critic),
    )


def with_padding(rollout: Rollout, left: int, right: int, pad_id: int) -> Rollout:
    """Return the rollout with more padding, and another pad id."""
    tokens = rollout.tokens
    width = tokens.prompt_ids.shape[1]
    padded = torch.arange(width) < width - tokens.prompt_lengths[:, None]
    prompts = tokens.prompt_ids.masked_fill(padded, pad_id)
    responses = tokens.response_ids.masked_fill(~tokens.response_mask, pad_id)
    pad = torch.nn.functional.pad
    return replace(
        rollout,
        tokens=Tokens(
            pad(prompts, (left, 0), value=pad_id),
            tokens.prompt_lengths,
            pad(responses, (0, right), value=pad_id),
            tokens.response_lengths,
        ),
        logprobs=pad(rollout.logprobs, (0, right)),
        sampling_logprobs=pad(rollout.sampling_logprobs, (0, right)),
    )


@each_critic
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("left", "right", "pad_id"), [(0, 0, 305), (5, 0, 0), (2, 3, 44)])
def test_neither_the_padding_nor_its_id_changes_anything(critic, family, left, right, pad_id):
    rollout = rollout_of(LanguageModel(tiny_model(family, layers=3)), top_k=200)
    expected = experience_of(rollout, critic, family)
    padded = experience_of(with_padding(rollout, left, right, pad_id), critic, family)
    width = rollout.tokens.response_ids.shape[1]
    for name in PER_TOKEN:
        assert (getattr(padded, name)[:, width:] == 0).all()
    cut = {name: getattr(padded, name)[:, :width] for name in PER_TOKEN}
    assert_same(replace(padded, **cut), expected)


@each_critic
def test_the_order_of_the_batch_changes_nothing(rollout, critic):
    order = torch.tensor([2, 0, 3, 1])
    tokens = rollout.tokens
    moved = replace(
        rollout,
        tokens=Tokens(
            tokens.prompt_ids[order],
            tokens.prompt_lengths[order],
            tokens.response_ids[order],
            tokens.response_lengths[order],
        ),
        logprobs=rollout.logprobs[order],
    )
    one = experience_of(rollout, critic)
    other = experience_of(moved, critic, scores=SCORES_OF_FOUR[order])
    for name in PER_TOKEN:
        torch.testing.assert_close(
            getattr(one, name)[order], getattr(other, name), rtol=1e-4, atol=1e-4, msg=name
        )


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["head", "baseline"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recorded", [True, False])
def test_the_trunk_does_not_change_an_experience(critic, family, recorded):
    """Trunk states are recorded while decoding, or computed later.

    With a truncated sampler, the old log-probs are computed from the trunk states too.
    """
    policy = LanguageModel(tiny_model(family, layers=3), num_layers_unfrozen=1)
    rollout = rollout_of(policy, top_k=200)
    bare = replace(rollout, trunk_states=None)
    ordinary = experience_of(bare, critic, family, seed=0)
    assert ordinary.trunk_states is None
    for max_tokens in (17, 10**6):
        split = experience_of(
            rollout if recorded else bare, critic, family, k=1, forward_batch_tokens=max_tokens
        )
        tokens = rollout.tokens
        states = split.trunk_states
        assert states.states.shape[1] == 64
        # a state is read only where a response token follows
        expected = policy.compute_trunk_states(tokens)
        for row in range(len(tokens)):
            rows = torch.tensor([row])
            alone = tokens.select(rows)
            found, exact = (x.select(rows).padded(alone)[0, :-1] for x in (states, expected))
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
        assert_same(split, ordinary)


def test_a_recorded_trunk_is_not_computed_again():
    policy = LanguageModel(tiny_model("llama", layers=3), num_layers_unfrozen=1)
    rollout = rollout_of(policy)
    assert experience_of(rollout, k=1).trunk_states is rollout.trunk_states


def test_an_experience_holds_no_graph(rollout):
    experience = experience_of(rollout)
    for name in (*PER_TOKEN, "scores"):
        assert not getattr(experience, name).requires_grad


# Scores of the user's own


def test_scores_of_the_users_own():
    def unused(prompts, completions):
        raise AssertionError("the reward model was asked")

    trainer = PPOTrainer(
        tiny_model("llama"), None, unused, tiny_tokenizer(), "cpu", config=PPOConfig(max_length=4)
    )
    rollout = trainer.rollout(["The film", "She"])
    for scores in ([0.5, -1.0], torch.tensor([0.5, -1.0], dtype=torch.float64)):
        experience = trainer.make_experience(rollout, scores)
        assert experience.scores.tolist() == [0.5, -1.0]
        assert experience.metrics["mean_reward"] == -0.25
        # the policy is the reference: the rewards are the scores
        torch.testing.assert_close(experience.rewards.sum(dim=1), experience.scores)
    with pytest.raises(ValueError, match=r"^scores: got shape \[1\], expected \[2\]"):
        trainer.make_experience(rollout, [0.5])
    with pytest.raises(ValueError, match=r"^scores: got nan for the prompt 'She'"):
        trainer.make_experience(rollout, [0.5, math.nan])
