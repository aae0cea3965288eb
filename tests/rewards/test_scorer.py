"""Several rewards with weights, the columns that they take, and what is logged."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_models import tiny_classifier, tiny_tokenizer
from tiny_trainer import (
    PROMPTS,
    changed,
    no_model_runs,
    one_line,
    tiny_reward_model,
    tiny_trainer,
    weights,
)
from torch import nn

from ppo_fast import PPO, ClassifierReward, PPOConfig
from ppo_fast.data.rollout import Rollout
from ppo_fast.run_folder.folder import RunFolder

ROWS = [{"prompt": text, "answer": i, "unit": "m"} for i, text in enumerate(PROMPTS)]


def lengths(prompts, completions):
    return [float(len(text)) for text in completions]


def answers(prompts, completions, answer):
    return [float(number) for number in answer]


def trainer_of(reward, **options):
    return tiny_trainer(reward, critic="baseline", **options)


# Columns


def test_a_function_gets_the_columns_that_it_names():
    seen = {}

    def reward(prompts, completions, answer, *, unit, missing="none", tokens=None):
        seen.update(answer=answer, unit=unit, missing=missing, tokens=tokens)
        return [0.0] * len(prompts)

    trainer = trainer_of(reward, samples_per_prompt=2)
    rollout = trainer.rollout(ROWS[:2])
    trainer.score(rollout)
    assert seen["answer"] == [0, 0, 1, 1]
    assert seen["unit"] == ["m"] * 4
    assert seen["missing"] == "none"
    assert seen["tokens"] is rollout.tokens


def test_what_every_function_can_ask_for():
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(columns)
        return [0.0] * len(prompts)

    trainer = trainer_of(reward)
    rollout = trainer.rollout(ROWS)
    trainer.score(rollout)
    assert set(seen) == {"answer", "unit", "messages", "completion_ids", "tokens"}
    counts = rollout.tokens.response_lengths.tolist()
    assert [len(ids) for ids in seen["completion_ids"]] == counts
    assert seen["completion_ids"][0] == rollout.tokens.response_ids[0, : counts[0]].tolist()
    assert seen["messages"] == rollout.messages


def test_functions_of_other_trainers_are_called_by_name():
    """Those of TRL take completions and columns, in any order, and prompts if they name them."""

    def reward(completions, answer, **kwargs):
        assert "prompts" in kwargs
        return [a + len(c) for a, c in zip(answer, completions, strict=True)]

    def without(answer, completions):
        return [a + len(c) for a, c in zip(answer, completions, strict=True)]

    rollout = trainer_of(reward).rollout(ROWS)
    expected = [i + len(c) for i, c in enumerate(rollout.completions)]
    assert trainer_of(reward).score(rollout).tolist() == expected
    assert trainer_of(without).score(rollout).tolist() == expected


@pytest.mark.parametrize("kind", ["function", "needs", "keyword"])
def test_a_column_that_the_data_lacks(kind):
    class Needing:
        needs = ("answer",)

        def __call__(self, prompts, completions, **columns):
            return [0.0] * len(prompts)

    def keyword(prompts, completions, *, answer):
        return [0.0] * len(prompts)

    reward = {"function": answers, "needs": Needing(), "keyword": keyword}[kind]
    trainer = trainer_of(reward)
    rows = [{"prompt": text, "solution": "x"} for text in PROMPTS]
    match = r"takes the column 'answer', which the data lacks \(.*: solution\); add it to the rows"
    for call in (trainer.step, lambda rows: trainer.train(rows, num_steps=1, progress=False)):
        with no_model_runs(), pytest.raises(ValueError, match=match) as caught:
            call(rows)
        assert one_line(caught)


def test_columns_of_tokens_sampled_elsewhere():
    trainer = trainer_of(answers)
    rollout = Rollout.from_tokens([[5, 6], [7]], [[8], [9]], columns={"answer": [3, 4]})
    assert trainer.make_experience(rollout).scores.tolist() == [3.0, 4.0]
    with pytest.raises(ValueError, match=r"columns\['answer'\]: got 1 entries, expected 2"):
        Rollout.from_tokens([[5, 6], [7]], [[8], [9]], columns={"answer": [3]})


def test_columns_stay_with_resampled_prompts():
    flips = iter(range(1000))

    def reward(prompts, completions, answer):
        for prompt, number in zip(prompts, answer, strict=True):
            assert PROMPTS[number] == prompt
        return [float(next(flips) % 2 if number != 2 else 0) for number in answer]

    trainer = trainer_of(reward, samples_per_prompt=2, max_resampled_batches=2)
    step = trainer.step(ROWS)
    assert step.metrics["prompts_resampled"] > 0
    assert [PROMPTS[n] for n in step.rollout.columns["answer"]] == step.rollout.prompts
    torch.testing.assert_close(step.rewards["reward"], step.scores)


# Several


def test_several_rewards_are_added_with_their_weights():
    trainer = trainer_of([lengths, answers], reward_weights=(0.5, -2.0))
    step = trainer.step(ROWS)
    own = {
        "lengths": torch.tensor([float(len(c)) for c in step.rollout.completions]),
        "answers": torch.arange(5.0),
    }
    torch.testing.assert_close(step.scores, 0.5 * own["lengths"] - 2 * own["answers"])
    for name, scores in own.items():
        torch.testing.assert_close(step.rewards[name], scores)
        assert step.metrics[f"reward/{name}/mean"] == pytest.approx(float(scores.mean()))
        std = float(scores.std(correction=0))
        assert step.metrics[f"reward/{name}/std"] == pytest.approx(std)


def test_names_are_of_a_dict_or_of_the_functions():
    class Named:
        name = "short"

        def __call__(self, prompts, completions):
            return [1.0] * len(prompts)

    trainer = trainer_of({"a": lengths, "b": Named()})
    assert list(trainer.scorer.rewards) == ["a", "b"]
    trainer = trainer_of([lengths, Named(), lengths])
    assert list(trainer.scorer.rewards) == ["lengths", "short", "lengths_2"]


@pytest.mark.parametrize(
    ("reward", "weights", "match"),
    [
        ([lengths, lengths], (1.0,), r"got 1 weights for 2 rewards \(lengths, lengths_2\), expec"),
        (lengths, (1.0, 2.0), "got 2 weights for 1 rewards"),
        ([], (), "reward: got no reward"),
        ({}, (), "reward: got no reward"),
    ],
)
def test_weights_that_do_not_match(reward, weights, match):
    with no_model_runs(), pytest.raises(ValueError, match=match) as caught:
        trainer_of(reward, reward_weights=weights)
    assert one_line(caught)


def test_something_in_the_list_is_no_reward():
    with pytest.raises(TypeError, match="reward_model: got int, expected a"):
        trainer_of([lengths, 3])


def test_none_is_for_what_a_reward_does_not_judge():
    def some(prompts, completions):
        return [None, 2.0, None, 4.0, 6.0]

    trainer = trainer_of([lengths, some], reward_weights=(1.0, 10.0))
    step = trainer.step(ROWS)
    own = torch.tensor([float(len(c)) for c in step.rollout.completions])
    torch.testing.assert_close(step.scores, own + torch.tensor([0.0, 20.0, 0.0, 40.0, 60.0]))
    assert step.metrics["reward/some/mean"] == pytest.approx(4.0)
    assert step.metrics["reward/some/judged"] == pytest.approx(0.6)
    assert "reward/lengths/judged" not in step.metrics
    assert math.isnan(float(step.rewards["some"][0]))
    alone = trainer_of(some)
    before = weights(alone.policy_model)
    with pytest.raises(ValueError, match="no reward judges the response to the prompt 'The film"):
        alone.step(ROWS)
    assert not changed(alone.policy_model, before)


def test_parts_of_a_score_are_added_and_logged():
    def both(prompts, completions):
        return {"long": [1.0] * 5, "kind": [0.0, 1.0, 2.0, 3.0, None]}

    step = trainer_of({"rule": both, "more": lengths}, reward_weights=(3.0, 0.0)).step(ROWS)
    assert step.scores.tolist() == [3.0, 6.0, 9.0, 12.0, 3.0]
    assert step.rewards["rule"].tolist() == [1.0, 2.0, 3.0, 4.0, 1.0]
    assert step.metrics["reward/rule/kind/mean"] == pytest.approx(1.5)
    assert step.metrics["reward/rule/long/std"] == 0.0


@pytest.mark.parametrize(
    ("parts", "error", "match"),
    [
        ({}, ValueError, "reward_model f: returned an empty mapping"),
        (
            {"a": [1.0] * 4},
            ValueError,
            r"f, part .a.: got shape \[4\], expected \[5\]",
        ),
        ({"a": [1.0] * 5, "b": ["x"] * 5}, TypeError, "part 'b': expected a list of numbers"),
        ({"a": [math.nan] * 5}, ValueError, "part 'a': got nan for the prompt 'The film was'"),
    ],
)
def test_parts_that_are_no_scores(parts, error, match):
    def f(prompts, completions):
        return parts

    with pytest.raises(error, match=match):
        trainer_of(f).step(ROWS)


def test_rewards_for_tokens_and_for_sequences_together():
    class PerToken(nn.Module):
        def forward(self, input_ids, attention_mask):
            return input_ids.float() / 100

    trainer = tiny_trainer([PerToken(), lengths], critic="head", reward_weights=(1.0, 0.5))
    rollout = trainer.rollout(PROMPTS)
    scores, tokens = trainer.score(rollout), rollout.tokens
    assert scores.shape == tokens.response_ids.shape
    for row, n in enumerate(tokens.response_lengths.tolist()):
        expected = tokens.response_ids[row, :n] / 100
        expected[-1] += 0.5 * len(rollout.completions[row])
        torch.testing.assert_close(scores[row, :n], expected)
        assert not scores[row, n:].any()


def test_a_model_and_a_function_together_read_the_same_responses():
    model = tiny_reward_model()
    alone = trainer_of(model)
    rollout = alone.rollout(PROMPTS)
    both = trainer_of([model, lengths], reward_weights=(2.0, 1.0)).score(rollout)
    own = torch.tensor([float(len(c)) for c in rollout.completions])
    torch.testing.assert_close(both, 2 * alone.score(rollout) + own)


def test_a_reward_can_be_a_directory(tmp_path):
    tiny_classifier("gpt2").save_pretrained(tmp_path / "liked")
    tiny_tokenizer().save_pretrained(tmp_path / "liked")
    trainer = trainer_of([str(tmp_path / "liked"), lengths])
    assert isinstance(trainer.reward_model[0], ClassifierReward)
    assert list(trainer.scorer.rewards) == ["ClassifierReward", "lengths"]
    rollout = trainer.rollout(PROMPTS)
    scores = trainer.reward_model[0](rollout.prompts, rollout.completions)
    own = torch.tensor([float(len(c)) for c in rollout.completions])
    torch.testing.assert_close(trainer.score(rollout), torch.tensor(scores) + own)
    with pytest.raises(FileNotFoundError, match=r"^reward: the folder .* holds no model"):
        trainer_of(str(tmp_path))


# Async functions, servers, the reference


def test_async_functions_are_called_once_a_response():
    async def rate(prompt, completion, answer):
        assert isinstance(completion, str)
        return float(answer)

    step = trainer_of([rate, lengths]).step(ROWS)
    assert step.rewards["rate"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_servers_are_asked_before_a_run():
    class Server:
        def check(self):
            raise ConnectionError("reward: http://127.0.0.1:1 does not answer")

        def __call__(self, prompts, completions):
            raise AssertionError("asked")

    trainer = trainer_of(Server())
    with no_model_runs(), pytest.raises(ConnectionError, match="does not answer"):
        trainer.train(PROMPTS, num_steps=1, progress=False)


def test_a_reward_can_ask_the_reference():
    class Asks:
        def use_reference(self, model, tokenizer):
            self.model, self.tokenizer = model, tokenizer

        def __call__(self, prompts, completions):
            return [0.0] * len(prompts)

    reward = Asks()
    trainer = trainer_of(reward)
    assert reward.model is trainer.reference.model
    assert reward.tokenizer is trainer.tokenizer


# Device and dtype


class Placed(nn.Module):
    """Says on which device it is called."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.called_on = []

    def forward(self, input_ids, attention_mask):
        self.called_on.append((input_ids.device.type, attention_mask.device.type))
        return torch.ones(len(input_ids))


def test_a_reward_on_a_device_of_its_own():
    """torch's meta device, which has no numbers, stands for a second GPU."""
    model = Placed()
    trainer = PPO(
        tiny_trainer(critic="baseline").policy_model,
        tiny_trainer().tokenizer,
        model,
        reward_device="meta",
        config=PPOConfig(critic="baseline", max_length=4),
    )
    assert trainer.step(PROMPTS).scores.tolist() == [1.0] * 5
    assert set(model.called_on) == {("meta", "meta")}
    assert trainer.policy.device.type == "cpu"


def test_objects_that_can_move_are_moved():
    class Movable:
        def to(self, device):
            self.device = torch.device(device)

        def __call__(self, prompts, completions):
            return [0.0] * len(prompts)

    reward = Movable()
    trainer_of(reward)
    assert reward.device.type == "cpu"


def test_a_device_that_is_none():
    with pytest.raises(ValueError, match="reward_device: got 'gpu'"):
        PPO(
            tiny_trainer(critic="baseline").policy_model,
            tiny_trainer().tokenizer,
            Placed(),
            reward_device="gpu",
            config=PPOConfig(critic="baseline"),
        )


def test_a_reward_keeps_its_dtype():
    model = tiny_reward_model().bfloat16()
    trainer = trainer_of(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert trainer.step(PROMPTS).scores.dtype == torch.float32
    assert trainer.policy.dtype == torch.float32


# Files


def test_samples_hold_rewards_and_columns(tmp_path):
    trainer = trainer_of([lengths, answers], reward_weights=(1.0, 2.0))
    step = trainer.step([row | {"when": object} for row in ROWS])
    with RunFolder(tmp_path) as folder:
        folder.write_samples(step)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["rewards"]["answers"] for row in rows] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [row["columns"]["answer"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[0]["columns"]["when"] == "<class 'object'>", "what JSON does not have is text"
    for row in rows:
        expected = row["rewards"]["lengths"] + 2 * row["rewards"]["answers"]
        assert row["score"] == pytest.approx(expected)
