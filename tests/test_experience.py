"""make_experience: small cases by hand, and what must not change an experience."""

from __future__ import annotations

import copy
import math
import statistics
from dataclasses import replace

import pytest
import torch
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

from ppo_fast import PPOTrainer
from ppo_fast.config import PPOConfig
from ppo_fast.critic import HeadCritic, ModelCritic, ValueHead
from ppo_fast.experience import Experience, make_experience, token_rewards
from ppo_fast.language_model import LanguageModel
from ppo_fast.models import ValueModel
from ppo_fast.ops import TokenLogprobs
from ppo_fast.rollout import Rollout, Sampling, decode
from ppo_fast.tokens import Tokens, make_tokens

CPU = torch.device("cpu")
PER_TOKEN = ("old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")


def assert_rows(found: torch.Tensor, expected: list[list[float]]) -> None:
    """Rows of different lengths; 0 beyond each."""
    width = found.shape[1]
    padded = [[*row, *[0.0] * (width - len(row))] for row in expected]
    torch.testing.assert_close(
        found.double(), torch.tensor(padded, dtype=torch.float64), rtol=0, atol=1e-6
    )


# By hand. Responses of ids (2, 4, 6) and (8); the reference gives id n the log-prob -n / 8, the
# critic its state the value n / 4. Every number below is exact in float32.

HAND = make_tokens([[3, 5], [7]], [[2, 4, 6], [8]], 0, CPU)
OLD = torch.tensor([[-0.5, -0.25, -1.25], [-0.5, 0.0, 0.0]])
SCORES = torch.tensor([1.0, -2.0])
# log pi - log ref: -1/4, 1/4, -1/2 and 1/2; half of it is the penalty
REWARDS = [[0.125, -0.125, 1.25], [-2.25]]
HAND_CONFIG = PPOConfig(
    gamma=0.5, gae_lambda=0.5, kl_penalty=0.5, kl_in="reward", whiten_advantages=False
)


class TableModel:
    """In a LanguageModel's place: log-probs from a table by token id."""

    lower = ()
    model = torch.nn.Linear(1, 1)

    def forward(self, tokens: Tokens, trunk: torch.Tensor | None) -> None:
        assert trunk is None

    def logprobs(self, forward: None, tokens: Tokens, *, temperature: float) -> TokenLogprobs:
        values = -tokens.response_ids / (8.0 * temperature)
        return TokenLogprobs(values.masked_fill(~tokens.response_mask, 0.0), None)


class TableCritic:
    reads_states = False

    def values(self, tokens: Tokens, states: torch.Tensor | None = None) -> torch.Tensor:
        assert states is None
        return (tokens.response_ids / 4.0).masked_fill(~tokens.response_mask, 0.0)


def hand_rollout(**sampling: float) -> Rollout:
    return Rollout(
        tokens=HAND,
        logprobs=OLD,
        sampling_logprobs=OLD,
        finished=torch.tensor([True, False]),
        sampling=Sampling(3, **sampling),
        trunk=None,
        prompts=["a", "b"],
        completions=["c", "d"],
    )


def by_hand(critic: object | None = None, rollout: Rollout | None = None, **changes) -> Experience:
    return make_experience(
        rollout or hand_rollout(),
        SCORES,
        policy=TableModel(),
        reference=TableModel(),
        critic=critic,
        config=replace(HAND_CONFIG, **changes),
    )


def test_the_score_sits_on_the_last_token_and_the_kl_on_every_one():
    experience = by_hand(TableCritic())
    assert_rows(experience.old_logprobs, [[-0.5, -0.25, -1.25], [-0.5]])
    assert_rows(experience.ref_logprobs, [[-0.25, -0.5, -0.75], [-1.0]])
    assert_rows(experience.rewards, REWARDS)
    assert experience.scores.tolist() == [1.0, -2.0], "before KL"


@pytest.mark.parametrize("changes", [{"kl_in": "loss"}, {"kl_penalty": 0.0}])
def test_without_kl_in_the_reward_there_is_the_score_alone(changes):
    assert_rows(by_hand(TableCritic(), **changes).rewards, [[0.0, 0.0, 1.0], [-2.0]])


@pytest.mark.parametrize(
    ("estimator", "kl"),
    [
        ("abs", [0.25, 0.25, 0.5, 0.5]),
        ("k2", [1 / 32, 1 / 32, 1 / 8, 1 / 8]),
        ("k3", [math.expm1(d) - d for d in (0.25, -0.25, 0.5, -0.5)]),
    ],
)
def test_other_estimators_in_the_reward(estimator, kl):
    rewards = token_rewards(
        SCORES, OLD, -HAND.response_ids / 8.0, HAND, replace(HAND_CONFIG, kl_estimator=estimator)
    )
    a, b, c, d = (-0.5 * k for k in kl)
    assert_rows(rewards, [[a, b, 1.0 + c], [-2.0 + d]])


def test_advantages_and_returns_with_a_value_function():
    experience = by_hand(TableCritic())
    assert_rows(experience.values, [[0.5, 1.0, 1.5], [2.0]])
    # delta = 1.25 - 1.5;  -0.125 + 0.75 - 1;  0.125 + 0.5 - 0.5;  -2.25 - 2; decay 1/4
    advantages = [[0.015625, -0.4375, -0.25], [-4.25]]
    assert_rows(experience.advantages, advantages)
    assert_rows(experience.returns, [[0.515625, 0.5625, 1.25], [-2.25]])


def test_whitened_advantages_and_returns_from_unwhitened_ones():
    plain, white = by_hand(TableCritic()), by_hand(TableCritic(), whiten_advantages=True)
    valid = white.advantages[HAND.response_mask].tolist()
    assert statistics.mean(valid) == pytest.approx(0, abs=1e-6)
    assert statistics.variance(valid) == pytest.approx(1, abs=1e-6)
    raw = [0.015625, -0.4375, -0.25, -4.25]
    mean, deviation = statistics.mean(raw), statistics.stdev(raw)
    first, second, third, fourth = ((a - mean) / deviation for a in raw)
    assert_rows(white.advantages, [[first, second, third], [fourth]])
    assert torch.equal(white.returns, plain.returns)
    assert white.metrics["mean_advantage"] == pytest.approx(statistics.mean(raw))


def test_the_baseline_is_of_the_other_sequences_and_uses_lambda_one():
    experience = by_hand(None)
    # scores 1 and -2, discounted by 0.5 a token; advantages are discounted sums of what is left,
    # less the baseline
    assert_rows(experience.values, [[-0.5, -1.0, -2.0], [1.0]])
    assert_rows(experience.advantages, [[0.875, 1.5, 3.25], [-3.25]])
    assert torch.equal(experience.advantages, by_hand(None, gae_lambda=0.0).advantages)


def test_beyond_a_response_everything_is_exactly_zero():
    for critic in (TableCritic(), None):
        for whiten in (True, False):
            experience = by_hand(critic, whiten_advantages=whiten)
            for name in PER_TOKEN:
                values = getattr(experience, name)
                assert values.dtype == torch.float32
                assert values.shape == (2, 3)
                assert (values[~HAND.response_mask] == 0).all(), name


def test_metrics_by_hand():
    metrics = by_hand(TableCritic()).metrics
    assert metrics["mean_reward"] == -0.5, "of the scores, before KL"
    assert metrics["reward_std"] == 1.5
    assert metrics["kl_divergence"] == 0.0, "-1/4 + 1/4 - 1/2 + 1/2"
    assert metrics["mean_advantage"] == -4.921875 / 4
    assert metrics["entropy"] == 2.5 / 4
    assert metrics["response_length"] == 2.0
    assert metrics["finished_fraction"] == 0.5
    assert all(type(value) is float for value in metrics.values())


def test_kl_metrics_are_a_token_mean_and_a_sequence_mean():
    rollout = replace(hand_rollout(), logprobs=OLD + 1.0 * HAND.response_mask)
    metrics = by_hand(TableCritic(), rollout).metrics
    assert metrics["kl_divergence"] == 1.0
    assert metrics["kl_sequence"] == 2.0


# Whose log-probs are the old ones


def test_old_logprobs_are_those_of_the_sampling_pass():
    rollout = hand_rollout(temperature=0.5)
    assert by_hand(TableCritic(), rollout).old_logprobs is rollout.logprobs


@pytest.mark.parametrize("sampling", [{"top_k": 5}, {"top_p": 0.9}])
def test_a_truncated_sampler_means_recomputed_old_logprobs(sampling):
    experience = by_hand(TableCritic(), hand_rollout(**sampling))
    assert_rows(experience.old_logprobs, [[-0.25, -0.5, -0.75], [-1.0]])
    assert_rows(experience.rewards, [[0.0, 0.0, 1.0], [-2.0]])


def test_half_precision_means_recomputed_old_logprobs():
    policy = TableModel()
    policy.model = torch.nn.Linear(1, 1).bfloat16()
    experience = make_experience(
        hand_rollout(),
        SCORES,
        policy=policy,
        reference=TableModel(),
        critic=None,
        config=HAND_CONFIG,
    )
    assert_rows(experience.old_logprobs, [[-0.25, -0.5, -0.75], [-1.0]])


# With models

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
        return ModelCritic(ValueModel(tiny_model("gpt2", seed=3), 64).eval(), budget=10_000)
    return None


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
    """``seed`` is the reference's: another model than the policy, unless they share a trunk."""
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
    """In float64, each row alone: one temperature for both models, each before the token."""
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
@pytest.mark.parametrize("budget", [1, 17, 10**6])
def test_the_token_budget_changes_nothing_but_rounding(rollout, critic, budget):
    assert_same(
        experience_of(rollout, critic, forward_batch_tokens=budget),
        experience_of(rollout, critic),
    )


def with_padding(rollout: Rollout, left: int, right: int, pad_id: int) -> Rollout:
    """More columns, and another id at every padded place."""
    tokens = rollout.tokens
    prompts = tokens.prompt_ids.masked_fill(~tokens.prompt_mask, pad_id)
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


@pytest.mark.parametrize("critic", ["head", "baseline"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recorded", [True, False])
def test_the_trunk_changes_nothing_but_time(critic, family, recorded):
    """Recorded while decoding, or computed for tokens that came without one. With a truncated
    sampler, so that old log-probs come from the trunk too."""
    policy = LanguageModel(tiny_model(family, layers=3), num_layers_unfrozen=1)
    rollout = rollout_of(policy, top_k=200)
    bare = replace(rollout, trunk=None)
    ordinary = experience_of(bare, critic, family, seed=0)
    assert ordinary.trunk is None
    for budget in (17, 10**6):
        split = experience_of(
            rollout if recorded else bare, critic, family, k=1, forward_batch_tokens=budget
        )
        assert split.trunk.shape == (*rollout.tokens.input_ids.shape, 64)
        # a state is read only where a response token follows
        tokens = rollout.tokens
        read = tokens.attention_mask.bool()
        last = tokens.prompt_ids.shape[1] + tokens.response_lengths - 1
        read[torch.arange(len(tokens)), last] = False
        torch.testing.assert_close(
            split.trunk[read], policy.trunk(tokens)[read], rtol=1e-4, atol=1e-4
        )
        assert_same(split, ordinary)


def test_a_recorded_trunk_is_not_computed_again():
    policy = LanguageModel(tiny_model("llama", layers=3), num_layers_unfrozen=1)
    rollout = rollout_of(policy)
    assert experience_of(rollout, k=1).trunk is rollout.trunk


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
