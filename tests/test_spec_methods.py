"""The methods that users of the classic interface call by name."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from tiny_trainer import PROMPTS, tiny_reward_model, tiny_trainer, true_logprobs
from torch import nn

from ppo_fast import PPOTrainer

PAIRS = (["The film was", "She thought"], [" over.", " the phone would last another year."])

SIGNATURES = {
    "compute_gae": ["rewards", "values", "dones"],
    "compute_kl_divergence": ["current_logprobs", "reference_logprobs"],
    "compute_ppo_loss": ["old_logprobs", "new_logprobs", "advantages"],
    "generate_responses": ["prompts", "max_length", "temperature"],
    "compute_rewards": ["prompts", "responses"],
    "compute_values": ["prompts", "responses"],
    "get_logprobs": ["prompts", "responses"],
    "get_reference_logprobs": ["prompts", "responses"],
    "train_step": ["prompts", "num_epochs_per_batch", "max_length", "temperature"],
    "train": [
        "prompts",
        "num_steps",
        "batch_size",
        "num_epochs_per_batch",
        "max_length",
        "temperature",
        "checkpoint_dir",
        "checkpoint_freq",
    ],
    "save_checkpoint": ["checkpoint_dir", "step"],
    "load_checkpoint": ["checkpoint_path"],
    "get_statistics": [],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_methods_take_the_arguments_of_the_spec(name):
    parameters = list(inspect.signature(getattr(PPOTrainer, name)).parameters)[1:]
    assert parameters[: len(SIGNATURES[name])] == SIGNATURES[name]


# Formulas


def test_gae_by_hand():
    trainer = tiny_trainer(gamma=0.5, gae_lambda=0.5)
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    values = torch.tensor([[0.5, 1.0, 2.0]])
    # delta_2 = 4 - 2, delta_1 = 2 + .5 * 2 - 1, delta_0 = 1 + .5 * 1 - .5; A_t = delta_t + A / 4
    expected = torch.tensor([[1.0 + 2.5 / 4, 2.0 + 2.0 / 4, 2.0]])
    advantages, returns = trainer.compute_gae(rewards, values, torch.zeros(1, 3))
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_gae_ends_an_episode_where_done(dtype):
    trainer = tiny_trainer(gamma=0.5, gae_lambda=0.5)
    rewards = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    values = torch.tensor([[0.5, 1.0, 2.0], [0.5, 1.0, 2.0]])
    dones = torch.tensor([[0, 1, 0], [1, 0, 0]]).to(dtype)
    advantages, returns = trainer.compute_gae(rewards, values, dones)
    # done: neither the next value nor the next advantage counts
    expected = torch.tensor([[1.0 + 1.0 / 4, 2.0 - 1.0, 2.0], [1.0 - 0.5, 2.0 + 2.0 / 4, 2.0]])
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + values)


def test_kl_divergence_is_the_mean_of_current_minus_reference():
    trainer = tiny_trainer()
    current = torch.tensor([[-1.0, -2.0], [-3.0, -0.5]])
    assert trainer.compute_kl_divergence(current, current).item() == 0.0
    reference = torch.tensor([[-2.0, -2.0], [-3.0, -3.5]])
    kl = trainer.compute_kl_divergence(current, reference)
    assert kl.shape == ()
    assert kl.item() == 1.0
    assert trainer.compute_kl_divergence(reference, current).item() == -1.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # clipped: no gain from raising it further
        (0.5, 2.0, -1.0, -1.0),  # the minimum is the unclipped term: it may be raised
        (0.5, -2.0, 1.6, 0.0),  # clipped: no gain from lowering it further
        (1.5, -2.0, 3.0, 3.0),  # the minimum is the unclipped term: it may be lowered
    ],
)
def test_ppo_loss_clips(ratio, advantage, loss, gradient):
    trainer = tiny_trainer()
    old = torch.tensor([[-2.0]])
    new = (old + torch.tensor(ratio).log()).requires_grad_()
    found = trainer.compute_ppo_loss(old, new, torch.tensor([[advantage]]))
    assert found.shape == ()
    assert found.item() == pytest.approx(loss, rel=1e-6)
    found.backward()
    # d/d(new) of -ratio * A is -ratio * A itself
    assert new.grad.item() == pytest.approx(gradient, rel=1e-6, abs=1e-12)


def test_ppo_loss_is_a_mean_over_tokens_with_the_trainers_epsilon():
    trainer = tiny_trainer(clip_epsilon=0.4)
    old = torch.zeros(2, 2)
    new = torch.tensor([[1.5, 1.0], [0.5, 1.0]]).log()
    advantages = torch.tensor([[1.0, 1.0], [-1.0, 3.0]])
    loss = trainer.compute_ppo_loss(old, new, advantages)
    assert loss.item() == pytest.approx(-(1.4 + 1.0 - 0.6 + 3.0) / 4, rel=1e-6)


# Texts


def test_generate_responses():
    trainer = tiny_trainer()
    responses, logprobs = trainer.generate_responses(PROMPTS, max_length=9, temperature=0.8)
    assert len(responses) == len(PROMPTS)
    assert all(isinstance(text, str) for text in responses)
    tokens = trainer.last_rollout.tokens
    assert logprobs.shape == tokens.response_ids.shape
    assert logprobs.shape[0] == 5
    assert logprobs.shape[1] <= 9
    expected = true_logprobs(trainer.policy_model, tokens, 0.8)
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-4)


def test_defaults_of_the_spec_are_150_tokens_at_temperature_1():
    trainer = tiny_trainer(max_length=150)
    trainer.policy_model.generation_config.eos_token_id = None
    trainer.tokenizer.eos_token = None
    # room for them: the tiny models have 128 positions, rotary ones that no table limits
    trainer.policy_model.config.max_position_embeddings = 512
    _, logprobs = trainer.generate_responses(["The"])
    assert logprobs.shape == (1, 150)
    expected = true_logprobs(trainer.policy_model, trainer.last_rollout.tokens, 1.0)
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-4)


def retokenised(trainer, responses):
    return [trainer.tokenizer(text, add_special_tokens=False)["input_ids"] for text in responses]


def sampled_ids(trainer):
    tokens = trainer.last_rollout.tokens
    rows = zip(tokens.response_ids.tolist(), tokens.response_lengths.tolist(), strict=True)
    return [row[:n] for row, n in rows]


def test_sampled_texts_are_read_as_the_sampled_ids():
    trainer = tiny_trainer()
    responses, logprobs = trainer.generate_responses(PROMPTS, max_length=9)
    ids, again = sampled_ids(trainer), retokenised(trainer, responses)
    assert sum(a != b for a, b in zip(ids, again, strict=True)) >= 3, "else this shows nothing"
    found = trainer.get_logprobs(PROMPTS, responses)
    assert found.shape == logprobs.shape
    torch.testing.assert_close(found, logprobs, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        trainer.get_reference_logprobs(PROMPTS, responses), logprobs, rtol=0, atol=1e-4
    )
    # in another order, and some of them
    order = [3, 0]
    part = trainer.get_logprobs([PROMPTS[i] for i in order], [responses[i] for i in order])
    torch.testing.assert_close(part, logprobs[order, : part.shape[1]], rtol=0, atol=1e-4)


def test_the_same_texts_sampled_from_different_tokens():
    trainer = tiny_trainer()
    prompts = ["The film was"] * 40
    responses, logprobs = trainer.generate_responses(prompts, max_length=1)
    first = {}
    for text, ids in zip(responses, sampled_ids(trainer), strict=True):
        first.setdefault(text, []).append(ids)
    # bytes that are not valid UTF-8 alone all decode to the replacement character
    assert any(len(set(map(tuple, ids))) > 1 for ids in first.values())
    for _ in range(2):
        torch.testing.assert_close(
            trainer.get_logprobs(prompts, responses), logprobs, rtol=0, atol=1e-4
        )


def test_only_the_last_samples_are_remembered():
    trainer = tiny_trainer()
    responses, old = trainer.generate_responses(PROMPTS, max_length=9)
    trainer.generate_responses(["There"], max_length=2)
    found = trainer.get_logprobs(PROMPTS, responses)
    lengths = [len(ids) for ids in retokenised(trainer, responses)]
    assert found.shape == (5, max(lengths))
    assert found.shape != old.shape or not torch.allclose(found, old, atol=1e-3)


def test_a_response_of_eos_alone_is_remembered():
    trainer = tiny_trainer()
    rollout = trainer.rollout(PROMPTS[:1], max_length=1)
    rollout.tokens.response_ids.fill_(trainer.tokenizer.eos_token_id)
    trainer.last_rollout = replace(rollout, completions=[""])
    expected = true_logprobs(trainer.policy_model, rollout.tokens)
    found = trainer.get_logprobs(PROMPTS[:1], [""])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


class WithSpecialTokens:
    """A tokenizer that adds EOS at the start and the end of every text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts, add_special_tokens=True, **options):
        encoded = self.tokenizer(texts, add_special_tokens=False, **options)
        if add_special_tokens:
            eos, ids = self.tokenizer.eos_token_id, encoded["input_ids"]
            encoded["input_ids"] = (
                [eos, *ids, eos] if isinstance(texts, str) else [[eos, *row, eos] for row in ids]
            )
        return encoded


def test_other_text_is_encoded_without_special_tokens_and_gets_no_eos():
    trainer = tiny_trainer()
    plain = trainer.tokenizer
    trainer.tokenizer = WithSpecialTokens(plain)
    seen = []

    def forward(tokens, trunk_states=None, inner=trainer.policy.forward):
        seen.append(tokens)
        return inner(tokens, trunk_states)

    trainer.policy.forward = forward
    found = trainer.get_logprobs(*PAIRS)
    (tokens,) = seen
    order = torch.argsort(tokens.lengths)  # batches go longest first
    for row, prompt, response in zip(order.tolist(), *PAIRS, strict=True):
        ids = tokens.sequences()[row].tolist()
        n = int(tokens.prompt_lengths[row])
        assert ids[:n] == [0, *plain(prompt)["input_ids"]], "no EOS before the response"
        assert ids[n:] == plain(response)["input_ids"]
    lengths = [len(plain(response)["input_ids"]) for response in PAIRS[1]]
    assert found.shape == (2, max(lengths))
    assert (found[0, lengths[0] :] == 0).all()
    assert (found[0, : lengths[0]] < 0).all()


def test_logprobs_of_other_text():
    trainer = tiny_trainer(temperature=0.7)
    with torch.no_grad():
        for p in trainer.policy_model.parameters():
            p.mul_(1.1)
    tokens = trainer._pairs(*PAIRS).tokens
    for model, method in (
        (trainer.policy_model, trainer.get_logprobs),
        (trainer.reference_model, trainer.get_reference_logprobs),
    ):
        for temperature in (None, 1.3):
            found = method(*PAIRS, temperature=temperature)
            expected = true_logprobs(model, tokens, temperature or 0.7)
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
            assert not found.requires_grad
    difference = trainer.get_logprobs(*PAIRS) - trainer.get_reference_logprobs(*PAIRS)
    assert difference.abs().max() > 1e-2


def test_rewards_are_the_score_on_the_last_token():
    reward_model = tiny_reward_model()
    trainer = tiny_trainer(reward_model)
    rewards = trainer.compute_rewards(*PAIRS)
    lengths = [len(trainer.tokenizer(text)["input_ids"]) for text in PAIRS[1]]
    assert rewards.shape == (2, max(lengths))
    expected = torch.zeros_like(rewards)
    for b, texts in enumerate(zip(*PAIRS, strict=True)):
        ids = torch.tensor([[i for text in texts for i in trainer.tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            expected[b, lengths[b] - 1] = reward_model(ids)[0]
    torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-5)
    assert (rewards != 0).sum() == 2


def test_rewards_of_a_function_and_of_sampled_pairs():
    trainer = tiny_trainer(lambda prompts, completions: [7.0 for _ in completions])
    responses, logprobs = trainer.generate_responses(PROMPTS, max_length=9)
    rewards = trainer.compute_rewards(PROMPTS, responses)
    assert rewards.shape == logprobs.shape
    last = trainer.last_rollout.tokens.response_lengths - 1
    assert rewards[torch.arange(5), last].tolist() == [7.0] * 5
    assert rewards.sum() == 35.0


@pytest.mark.parametrize("critic", ["model", "head"])
def test_values_are_those_of_the_states_before_each_token(critic):
    trainer = tiny_trainer(critic=critic)
    nn.init.normal_(next(trainer.critic.module.parameters()))
    values = trainer.compute_values(*PAIRS)
    lengths = [len(trainer.tokenizer(text)["input_ids"]) for text in PAIRS[1]]
    assert values.shape == (2, max(lengths))
    assert not values.requires_grad
    expected = torch.zeros_like(values)
    for b, (prompt, response) in enumerate(zip(*PAIRS, strict=True)):
        p = trainer.tokenizer(prompt)["input_ids"]
        ids = torch.tensor([p + trainer.tokenizer(response)["input_ids"]])
        with torch.no_grad():
            if critic == "model":
                row = trainer.value_model(ids)[0]
            else:
                states = trainer.policy_model.model(input_ids=ids).last_hidden_state
                row = trainer.critic.module(states)[0]
        expected[b, : lengths[b]] = row[len(p) - 1 : -1]
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    assert expected[0, lengths[0] - 1] != 0
    assert (values[0, lengths[0] :] == 0).all()


def test_values_without_a_value_function():
    with pytest.raises(
        ValueError, match=r"compute_values: the critic has no value.*value_model.*head"
    ):
        tiny_trainer(critic="baseline").compute_values(*PAIRS)


METHODS = ["compute_rewards", "compute_values", "get_logprobs", "get_reference_logprobs"]


@pytest.mark.parametrize("method", METHODS)
def test_pairs_that_do_not_fit(method):
    call = getattr(tiny_trainer(), method)
    with pytest.raises(ValueError, match=r"responses: got 1, expected 2"):
        call(PAIRS[0], PAIRS[1][:1])
    with pytest.raises(ValueError, match=r"responses\[1\]: '' is empty after tokenisation"):
        call(PAIRS[0], [" over.", ""])
    with pytest.raises(ValueError, match=r"prompts\[0\]: '' is empty after tokenisation"):
        call(["", "She"], PAIRS[1])
    with pytest.raises(ValueError, match=r"policy_model's context of 128"):
        call(["The", "She"], [" over.", "z" * 130])


def test_statistics():
    trainer = tiny_trainer()
    assert (
        trainer.get_statistics()
        == {
            "total_steps": 0,
            "avg_reward": 0.0,
            "avg_kl_divergence": 0.0,
            "avg_policy_loss": 0.0,
            "avg_value_loss": 0.0,
        }
        | trainer.stats
    )
    steps = [trainer.train_step(PROMPTS) for _ in range(3)]
    statistics = trainer.get_statistics()
    assert statistics["total_steps"] == 3
    for average, metric in {
        "avg_reward": "mean_reward",
        "avg_kl_divergence": "kl_divergence",
        "avg_policy_loss": "policy_loss",
        "avg_value_loss": "value_loss",
    }.items():
        mean = sum(step[metric] for step in steps) / 3
        assert statistics[average] == pytest.approx(mean, rel=1e-9, abs=1e-12)
