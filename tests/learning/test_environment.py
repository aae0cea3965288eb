"""Training with an environment that replies within responses."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS, changed, count_letters, no_model_runs, tiny_trainer, weights

from ppo_fast import PPOConfig, PPOTrainer
from ppo_fast.ops import gae
from ppo_fast.rollout import TransformersEngine, Turn

EOS = list(range(0, 307, 6))  # one token in six ends a turn


class Calculator:
    """Replies once."""

    def __init__(self, prompt: str) -> None:
        self.prompt, self.turns = prompt, []

    def reply(self, turn: Turn) -> str | None:
        self.turns.append(turn)
        return None if len(self.turns) > 1 else f" = {len(self.prompt)}."


def trainer_with(environment=Calculator, reward=count_letters, **options) -> PPOTrainer:
    policy, tokenizer = tiny_model(hidden=32), tiny_tokenizer()
    policy.generation_config.eos_token_id = EOS
    settings = {"max_length": 24, "learning_rate": 1e-3, "critic": "head"} | options
    return PPOTrainer(
        policy,
        None,
        reward,
        tokenizer,
        "cpu",
        config=PPOConfig(**settings),
        environment=environment,
    )


@pytest.mark.parametrize("critic", ["head", "baseline", "top"])
def test_a_step_trains(critic):
    options = {"num_layers_unfrozen": 1} if critic == "top" else {}
    trainer = trainer_with(critic=critic, **options)
    before = weights(trainer.policy_model)
    step = trainer.step(PROMPTS)
    tokens = step.rollout.tokens
    replied = tokens.response_lengths - tokens.trained_counts
    assert (replied > 0).sum() >= 2
    assert changed(trainer.policy_model, before)
    assert step.metrics["first_max_log_ratio"] < 1e-3
    epochs = trainer.config.num_epochs
    assert step.metrics["tokens"] == epochs * float(tokens.trained_counts.sum())
    assert step.metrics["response_length"] > float(tokens.trained_counts.sum()) / len(PROMPTS)


def test_replies_are_in_the_texts_that_are_scored():
    seen = []

    def reward(prompts, completions):
        seen.extend(completions)
        return [0.0] * len(prompts)

    rollout = trainer_with(reward=reward).step(PROMPTS).rollout
    replied = rollout.tokens.response_lengths > rollout.tokens.trained_counts
    assert all(" = " in text for text, has in zip(seen, replied.tolist(), strict=True) if has)


def test_advantages_skip_replies_and_the_score_is_on_the_last_chosen_token():
    trainer = trainer_with(kl_penalty=0.0, whiten_advantages=False)
    rollout = trainer.rollout(PROMPTS)
    scores = [1.0, -2.0, 3.0, 0.5, 2.0]
    e = trainer.make_experience(rollout, scores)
    values = torch.randn(e.values.shape)
    mask = rollout.tokens.response_mask
    found = gae(e.rewards, values, mask=mask, gamma=0.9, lam=0.8).advantages
    for i, valid in enumerate(mask):
        rewards, row = e.rewards[i, valid].tolist(), values[i, valid].tolist()
        assert rewards == [0.0] * (len(rewards) - 1) + [scores[i]]
        following = next_value = 0.0
        for t in reversed(range(len(row))):
            following = rewards[t] + 0.9 * next_value - row[t] + 0.9 * 0.8 * following
            next_value = row[t]
            at = valid.nonzero()[t]
            assert float(found[i, at]) == pytest.approx(following, rel=1e-4, abs=1e-5)


def test_what_stands_at_replies_changes_nothing():
    one, two = trainer_with(), trainer_with()
    rollout = one.rollout(PROMPTS)
    hidden = ~rollout.tokens.response_mask
    experiences = [t.make_experience(rollout, [1.0, 2.0, 3.0, 4.0, 5.0]) for t in (one, two)]
    for name in ("old_logprobs", "ref_logprobs", "values", "advantages", "returns"):
        getattr(experiences[1], name)[hidden] = torch.nan
    for trainer, experience in zip((one, two), experiences, strict=True):
        trainer.update(experience)
    assert not changed(one.policy_model, weights(two.policy_model))


def test_an_environment_for_each_sample():
    made = []

    def make(prompt):
        made.append(prompt)
        return Calculator(prompt)

    trainer_with(make, samples_per_prompt=2, critic="baseline").step(PROMPTS)
    assert made == [prompt for prompt in PROMPTS for _ in range(2)]


def test_wrong_environments_are_refused():
    with (
        no_model_runs(),
        pytest.raises(TypeError, match="environment: got str, expected a function that makes"),
    ):
        trainer_with("calculator")
    with pytest.raises(TypeError, match="environment: made NoneType, expected an object with"):
        trainer_with(lambda prompt: None).rollout(PROMPTS)
    base = tiny_trainer(critic="baseline")
    engine = TransformersEngine(base.policy_model, eos_ids=[], pad_id=0)
    with pytest.raises(TypeError, match="environment: TransformersEngine does not let an env"):
        PPOTrainer(
            base.policy_model,
            None,
            count_letters,
            base.tokenizer,
            "cpu",
            engine=engine,
            environment=Calculator,
        )


def test_environments_get_the_columns_that_they_name():
    made = []

    class Knows:
        def __init__(self, prompt, answer, *, unit="m"):
            made.append((prompt, answer, unit))

        def reply(self, turn):
            return None

    rows = [{"prompt": text, "answer": i, "other": 0} for i, text in enumerate(PROMPTS)]
    trainer_with(Knows).rollout(rows)
    assert made == [(text, i, "m") for i, text in enumerate(PROMPTS)]
