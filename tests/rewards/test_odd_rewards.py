"""Functions and data of odd shapes: what is passed to them, and what is refused in a line."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tiny_trainer import (
    PROMPTS,
    no_model_runs,
    one_line,
    tiny_reward_model,
    tiny_trainer,
)
from torch import nn

from ppo_fast import RewardModel, Rollout, evaluate
from ppo_fast.data.scores import Scores, join_scores

ROWS = [{"prompt": text, "answer": i} for i, text in enumerate(PROMPTS)]
NUMBERS = [0.0, 1.0, 2.0, 3.0, 4.0]


def trainer_of(reward, **options):
    return tiny_trainer(reward, critic="baseline", **options)


# What functions are given


def test_texts_are_ours_whatever_columns_the_data_has():
    seen = {}

    def reward(prompts, completions):
        seen.update(prompts=prompts, completions=completions)
        return NUMBERS

    rows = [row | {"completions": "GOLD", "prompts": "x", "self": 1} for row in ROWS]
    step = trainer_of(reward).step(rows)
    assert seen == {"prompts": PROMPTS, "completions": step.rollout.completions}


def test_columns_of_our_own_names_are_said_to_be_hidden(caplog):
    def reward(prompts, completions, messages):
        assert all(chat[-1]["role"] == "assistant" for chat in messages)
        return NUMBERS

    trainer = trainer_of(reward)
    for _ in range(2):
        trainer.step([row | {"messages": "mine", "tokens": 3} for row in ROWS])
    assert caplog.text.count("rewards get ppo_fast's own 'messages', not the data's") == 1
    assert "'tokens'" not in caplog.text, "nobody asked for it"


def positional_only(prompts, completions, answer, /):
    return [float(x) for x in answer]


def with_default(prompts, completions, /, answer=None):
    return [float(x) for x in answer]


def of_texts(*texts, answer=None):
    assert len(texts) == 2
    return [float(x) for x in answer]


def any_name(p, completions_, **columns):
    return [float(x) for x in columns["answer"]]


def undecorated(prompts, completions):
    return NUMBERS


def bare(*given, **named):
    """A wrapper without functools.wraps."""
    return undecorated(*given, **named)


@functools.wraps(undecorated)
def wrapped(*given, **named):
    return undecorated(*given, **named)


class Judge:
    async def judge(self, prompt, completion, answer):
        return float(answer)

    async def any(self, prompt, completion, **columns):
        return float(columns["answer"])


async def scaled(prompt, completion, answer, factor):
    return answer * factor


@pytest.mark.parametrize(
    "reward",
    [
        positional_only,
        with_default,
        of_texts,
        any_name,
        bare,
        wrapped,
        Judge().judge,
        Judge().any,
        functools.partial(scaled, factor=1.0),
    ],
    ids=str,
)
def test_functions_of_every_form(reward):
    rows = [row | {"completion": "x", "self": "y", "p": "z"} for row in ROWS]
    assert trainer_of(reward).step(rows).scores.tolist() == NUMBERS


def test_a_reward_cannot_change_what_another_gets():
    def rude(prompts, completions, messages, answer):
        messages[0][0]["content"] = "changed"
        answer.clear()
        prompts.clear()
        return NUMBERS

    def after(prompts, completions, messages, answer):
        assert messages[0][0]["content"] == PROMPTS[0]
        assert answer == [0, 1, 2, 3, 4]
        return NUMBERS

    trainer = trainer_of([rude, after])
    for _ in range(2):
        trainer.step(ROWS)


@pytest.mark.parametrize(
    ("reward", "match"),
    [
        (lambda prompts: NUMBERS, "takes prompts by position, expected prompts and completions"),
        (nn.ModuleList(), "ModuleList has no forward"),
    ],
)
def test_what_cannot_be_called_is_found_at_construction(reward, match):
    with no_model_runs(), pytest.raises(TypeError, match=match) as caught:
        trainer_of(reward)
    assert one_line(caught)


def test_coroutines_of_plain_functions_are_named():
    async def inner(prompt, completion):
        return 1.0

    with pytest.raises(TypeError, match=r"returned a coroutine; define it by async def"):
        trainer_of(lambda prompts, completions: inner("", "")).step(PROMPTS)


def test_hooks_of_async_objects_are_called():
    called = []

    class Server:
        def use_reference(self, model, tokenizer):
            called.append("reference")

        def check(self):
            called.append("check")

        def to(self, device):
            called.append("to")

        async def __call__(self, prompt, completion):
            return 1.0

    trainer_of(Server()).train(PROMPTS, num_steps=1, progress=False)
    assert called == ["to", "reference", "check"]


def test_needs_may_be_one_name():
    class Needing:
        needs = "answer"

        def __call__(self, prompts, completions, **columns):
            return NUMBERS

    with pytest.raises(ValueError, match="takes the column 'answer', which the data lacks"):
        trainer_of(Needing()).step(PROMPTS)


def test_rows_without_a_column_are_counted(caplog):
    def reward(prompts, completions, answer):
        return [0.0 if a is None else 1.0 for a in answer]

    trainer_of(reward).train([*ROWS[:3], *PROMPTS[3:]], num_steps=1, progress=False)
    assert "2 of 5 rows have no column 'answer': rewards get None there" in caplog.text


# What functions return


@pytest.mark.parametrize(
    "values",
    [
        np.array([0, 1, None, 3, 4], dtype=object),
        [np.float32(0), 1, None, torch.tensor(3.0, requires_grad=True), 4.0],
    ],
    ids=["object array", "mixed list"],
)
def test_none_in_arrays_and_lists(values):
    trainer = trainer_of([lambda p, c: values, lambda p, c: [0.0] * 5])
    assert trainer.step(PROMPTS).scores.tolist() == [0.0, 1.0, 0.0, 3.0, 4.0]


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_lists_for_tokens_of_every_kind(kind):
    def reward(prompts, completions, completion_ids):
        rows = [kind([1.0] * len(ids)) for ids in completion_ids]
        return [*rows[:-1], None]

    trainer = tiny_trainer([reward, lambda p, c: [1.0] * 5], critic="head")
    rollout = trainer.rollout(PROMPTS)
    totals = trainer.score(rollout).sum(1)
    counts = rollout.tokens.response_lengths.float()
    assert totals.tolist() == [*(counts[:-1] + 1).tolist(), 1.0]


@pytest.mark.parametrize("rewards", [{1: len}, {"": len}, {"a/x": len}])
def test_names_of_rewards(rewards):
    rewards = dict.fromkeys(rewards, lambda prompts, completions: NUMBERS)
    with pytest.raises(ValueError, match="reward: got the name"):
        trainer_of(rewards)


@pytest.mark.parametrize("name", [1, ""])
def test_names_of_parts(name):
    with pytest.raises(ValueError, match=r"named a part (1|''), expected a text"):
        trainer_of(lambda p, c: {name: NUMBERS}).step(PROMPTS)


def test_parts_that_only_some_batches_have():
    first = Scores(torch.ones(2), {"a": torch.ones(2), "a/x": torch.ones(2)})
    second = Scores(torch.zeros(1), {"a": torch.zeros(1)})
    joined = join_scores([first, second], 1)
    assert joined.parts["a"].tolist() == [1.0, 1.0, 0.0]
    assert joined.parts["a/x"][:2].tolist() == [1.0, 1.0]
    assert math.isnan(float(joined.parts["a/x"][2]))


# Reward models that are set later, and evaluations


def test_a_reward_model_that_is_set_later_is_prepared_too():
    trainer = trainer_of(lambda p, c: NUMBERS)
    rollout = trainer.rollout(PROMPTS)
    trainer.reward_model = model = tiny_reward_model().train()
    assert not model.training
    first = trainer.score(rollout)
    assert torch.equal(first, trainer.score(rollout)), "without dropout"
    with pytest.raises(ValueError, match="tokenizer: its largest id is 306, but reward_model has"):
        trainer.reward_model = RewardModel(tiny_model(vocab_size=100, hidden=32), 32)
    trainer.reward_model = {"a": model, "b": lambda p, c: NUMBERS}
    torch.testing.assert_close(trainer.score(rollout), first + torch.tensor(NUMBERS))


def test_an_evaluation_changes_nothing_of_the_training():
    trainer = trainer_of(lambda p, c: [float(len(text)) for text in c])
    step = trainer.step(PROMPTS)
    before = trainer.get_logprobs(step.rollout.prompts, step.rollout.completions)
    first = evaluate(trainer, ["There", "She"], samples_per_prompt=2)
    assert first == evaluate(trainer, ["There", "She"], samples_per_prompt=2)
    assert trainer.last_rollout.prompts == PROMPTS
    after = trainer.get_logprobs(step.rollout.prompts, step.rollout.completions)
    assert torch.equal(before, after)


def test_an_evaluation_checks_contexts():
    small = RewardModel(tiny_model("gpt2", layers=1, hidden=32), 32)
    small.base_model.config.n_positions = 20
    trainer = trainer_of(small, max_length=8)
    with no_model_runs(), pytest.raises(ValueError, match="exceeds reward_model's context of 20"):
        evaluate(trainer, ["The train to the north is there and not"])


def test_prompts_are_cut_for_the_contexts_of_rewards():
    small = RewardModel(tiny_model(layers=1, hidden=32), 32)
    small.base_model.config.max_position_embeddings = 20
    trainer = trainer_of(small, max_length=8, long_prompts="cut")
    prompts = ["The train to the north is there and not"] * 2
    trainer.train(prompts, num_steps=1, progress=False)
    assert trainer.last_rollout.tokens.prompt_lengths.tolist() == [12, 12]


# Prompts as ids, and cut ones, in methods that take texts


@pytest.mark.parametrize("kind", ["ids", "cut", "chat", "row"])
def test_pairs_of_texts_stand_for_what_was_sampled(kind):
    seen = []

    def reward(prompts, completions):
        seen.append(prompts)
        return [1.0] * len(prompts)

    trainer = trainer_of(reward, max_prompt_length=10, long_prompts="cut")
    trainer.tokenizer.chat_template = "{{ messages[0].content }}"
    long = "The train to the north is there; the other train is not."
    prompt = {
        "ids": trainer.tokenizer("The film")["input_ids"],
        "cut": long,
        "chat": [{"role": "user", "content": "The film"}],
        "row": {"prompt": "The film", "answer": 1},
    }[kind]
    responses, logprobs = trainer.generate_responses([prompt] * 7, temperature=2.0)
    found = trainer.get_logprobs([prompt] * 7, responses)
    torch.testing.assert_close(found, logprobs, rtol=1e-4, atol=1e-4)
    trainer.compute_rewards([prompt] * 7, responses)
    assert seen[-1] == trainer.last_rollout.prompts


def test_columns_of_a_rollout_of_tokens_do_not_replace_texts():
    seen = []

    def reward(prompts, completions):
        seen.append(completions)
        return [1.0, 2.0]

    trainer = trainer_of(reward)
    rollout = Rollout.from_tokens([[5]] * 2, [[60, 61]] * 2, columns={"completions": ["x", "y"]})
    trainer.make_experience(rollout)
    assert not {"x", "y"} & set(seen[-1])
