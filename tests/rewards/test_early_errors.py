"""Requests that are sent as responses end: their errors, and engines that tell of the ends."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from early_rewards import ROWS, trainer_of
from local_server import Answer, local_server
from tiny_trainer import PROMPTS, count_letters

from ppo_fast.rewards import AsyncReward, HTTPReward
from ppo_fast.rewards.calls import run


def left_running():
    """The number of tasks on the loop, but this one."""

    async def tasks():
        return len(asyncio.all_tasks()) - 1

    return run(tasks)


# Errors


async def fails(prompt, completion):
    if prompt == PROMPTS[1]:
        raise KeyError("answer")
    await asyncio.sleep(30)


def message_of(reward, **options):
    trainer = trainer_of(reward, **options)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - compared with another
        trainer.step(ROWS)
    assert left_running() == 0
    return type(caught.value), str(caught.value)


def test_a_failed_request_is_raised_with_the_same_words():
    kind, text = message_of(AsyncReward(fails))
    assert kind is RuntimeError
    assert text.startswith(f"fails failed for the prompt {PROMPTS[1]!r} after 1 try: KeyError")
    assert (kind, text) == message_of(AsyncReward(fails, early=False))


def test_a_failed_server_is_raised_with_the_same_words():
    def answer(body):
        return Answer("no", 401) if PROMPTS[0] in body["prompts"] else [0.0]

    with local_server(answer) as server:
        options = {"batch_size": len(PROMPTS) - 1, "headers": {"x-key": "secret"}}
        found = [
            message_of(HTTPReward(server.url, early=early, **options)) for early in (True, False)
        ]
    assert found[0][0] is RuntimeError
    assert "401" in found[0][1]
    assert found[0] == found[1]


def test_columns_that_cannot_be_sent_are_raised_with_the_same_words():
    rows = [{"prompt": text, "odd": {i} if i else i} for i, text in enumerate(PROMPTS)]
    found = []
    with local_server(lambda body: [0.0] * len(body["prompts"])) as server:
        for early in (True, False):
            trainer = trainer_of(HTTPReward(server.url, columns=["odd"], batch_size=1, early=early))
            with pytest.raises(ValueError, match="column 'odd' cannot be written") as caught:
                trainer.step(rows)
            found.append(str(caught.value))
            assert left_running() == 0
    assert found[0] == found[1]


@pytest.mark.parametrize("error", [RuntimeError("out of tokens"), KeyboardInterrupt()])
def test_an_interrupted_rollout_cancels_requests(decoding, error):
    begun, cancelled = threading.Event(), []

    async def slow(prompt, completion):
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(prompt)
            raise

    def interrupt(running):
        if running < len(PROMPTS):
            assert begun.wait(20)
            raise error

    trainer = trainer_of(slow)
    decoding.at_step = interrupt
    with pytest.raises(type(error)):
        trainer.step(PROMPTS)
    assert cancelled
    assert left_running() == 0


def test_requests_are_cancelled_when_another_reward_fails():
    def broken(prompts, completions):
        raise ValueError("no")

    async def slow(prompt, completion):
        await asyncio.sleep(60)

    with pytest.raises(RuntimeError, match="broken raised ValueError: no"):
        trainer_of([broken, slow]).step(PROMPTS)
    assert left_running() == 0


def test_a_step_that_failed_can_be_repeated():
    failing = [True]

    async def reward(prompt, completion):
        if failing[0]:
            raise KeyError("x")
        return count_letters([prompt], [completion])[0]

    trainer = trainer_of(reward)
    with pytest.raises(RuntimeError, match="KeyError"):
        trainer.step(PROMPTS)
    failing[0] = False
    step = trainer.step(PROMPTS)
    expected = count_letters(step.rollout.prompts, step.rollout.completions)
    assert step.scores.tolist() == pytest.approx(expected)


# Engines


async def letters(prompt, completion):
    await asyncio.sleep(0)
    return count_letters([prompt], [completion])[0]


class Engine:
    """The trainer's own engine, which tells what ``told`` makes of a response's ids."""

    def __init__(self, engine, told):
        self.engine, self.told, self.rows = engine, told, []
        self.sync_weights, self.close = engine.sync_weights, engine.close

    def generate(self, prompt_ids, sampling, *, seeds, ended=None):
        rollout = self.engine.generate(prompt_ids, sampling, seeds=seeds)
        lengths = rollout.tokens.response_lengths.tolist()
        for row, (ids, n) in enumerate(
            zip(rollout.tokens.response_ids.tolist(), lengths, strict=True)
        ):
            if ended is not None and (ids := self.told(row, ids[:n])):
                self.rows.append(row)
                ended(row, ids)
                ended(row, ids)  # a second time is ignored
        return rollout


def test_an_engine_may_tell_of_some_responses():
    trainer = trainer_of(letters)
    trainer.engine = engine = Engine(trainer.engine, lambda row, ids: ids if row % 2 else None)
    step = trainer.step(PROMPTS)
    expected = count_letters(step.rollout.prompts, step.rollout.completions)
    assert step.scores.tolist() == pytest.approx(expected)
    assert engine.rows == [1, 3]


def test_an_engine_that_tells_of_other_responses_is_refused():
    trainer = trainer_of(letters)
    trainer.engine = Engine(trainer.engine, lambda row, ids: [ids[0] + 1, *ids[1:]])
    with pytest.raises(RuntimeError, match="engine: said that response 0 had ended as"):
        trainer.step(PROMPTS)
    assert left_running() == 0


def test_an_engine_that_tells_nothing():
    trainer = trainer_of(letters)
    engine = trainer.engine

    class Silent:
        def generate(self, prompt_ids, sampling, *, seeds):
            return engine.generate(prompt_ids, sampling, seeds=seeds)

        sync_weights, close = engine.sync_weights, engine.close

    trainer.engine = Silent()
    step = trainer.step(PROMPTS)
    expected = count_letters(step.rollout.prompts, step.rollout.completions)
    assert step.scores.tolist() == pytest.approx(expected)


def test_rows_are_those_of_the_rollout():
    """Equal prompts, each with an answer of its own."""

    async def answer_of(prompt, completion, answer):
        return float(answer)

    rows = [{"prompt": PROMPTS[0], "answer": i} for i in range(6)]
    trainer = trainer_of(answer_of, rollout_slots=2)
    step = trainer.step(rows)
    assert step.scores.tolist() == torch.arange(6.0).tolist()
