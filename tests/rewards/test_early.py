"""Rewards that send requests are asked for each response as it ends, with unchanged results."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from local_server import Answer, local_server
from tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS, count_letters, tiny_trainer, without_times

from ppo_fast import PPO, PPOConfig
from ppo_fast.rewards import AsyncReward, HTTPReward, JudgeReward
from ppo_fast.rewards.calls import run
from ppo_fast.rollout.by_slots import _Decoding
from ppo_fast.runs.evaluation import evaluate

ROWS = [{"prompt": text, "answer": i} for i, text in enumerate(PROMPTS)]


def trainer_of(reward, **options):
    # about one token in three ends a response
    return tiny_trainer(reward, critic="baseline", **{"max_length": 12} | options)


def left_running():
    """The number of tasks on the loop, but this one."""

    async def tasks():
        return len(asyncio.all_tasks()) - 1

    return run(tasks)


async def letters(prompt, completion):
    await asyncio.sleep(0)
    return count_letters([prompt], [completion])[0]


@pytest.fixture
def decoding(monkeypatch):
    """Calls ``decoding.at_step(running)`` before each step; notes whether a rollout is on."""

    class Watched:
        on = False

        def at_step(self, running):
            pass

    watched, step, rollout = Watched(), _Decoding.step, _Decoding.rollout

    def watched_step(self):
        watched.on = True
        watched.at_step(len(self.running))
        step(self)

    def watched_rollout(self):
        watched.on = False
        return rollout(self)

    monkeypatch.setattr(_Decoding, "step", watched_step)
    monkeypatch.setattr(_Decoding, "rollout", watched_rollout)
    return watched


# Overlap


def test_a_response_is_judged_while_others_are_sampled(decoding):
    asked, while_decoding = threading.Event(), []

    async def reward(prompt, completion):
        while_decoding.append(decoding.on)
        asked.set()
        return 1.0

    def wait_for_reward(running):
        if running < len(PROMPTS):  # one has ended
            assert asked.wait(20), "no response was judged before all had ended"

    trainer = trainer_of(reward)  # its checks decode, too
    decoding.at_step = wait_for_reward
    step = trainer.step(PROMPTS)
    assert True in while_decoding
    assert len(while_decoding) == len(PROMPTS)
    assert step.scores.tolist() == [1.0] * len(PROMPTS)


def test_answers_may_come_after_the_rollout():
    ended = threading.Event()

    async def reward(prompt, completion):
        while not ended.is_set():
            await asyncio.sleep(0.001)
        return count_letters([prompt], [completion])[0]

    trainer = trainer_of(reward)
    rollout = trainer.rollout(PROMPTS, scorer=trainer.scorer)
    ended.set()
    expected = count_letters(rollout.prompts, rollout.completions)
    assert trainer.scores(rollout).total.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("size", [2, None])
def test_a_request_waits_for_its_own_responses(decoding, size):
    while_decoding = []

    def answer(body):
        while_decoding.append((decoding.on, len(body["prompts"])))
        return {"scores": count_letters(body["prompts"], body["completions"])}

    def wait_for_server(running):
        if size and running == 1:
            for _ in range(2000):
                if while_decoding:
                    return
                threading.Event().wait(0.01)

    with local_server(answer) as server:
        trainer = trainer_of(HTTPReward(server.url, batch_size=size), max_length=24)
        decoding.at_step = wait_for_server
        step = trainer.step(PROMPTS)
    expected = [1, 2, 2] if size else [len(PROMPTS)]
    assert sorted(count for _, count in while_decoding) == expected
    assert any(on for on, _ in while_decoding) == bool(size)
    expected = count_letters(step.rollout.prompts, step.rollout.completions)
    assert step.scores.tolist() == pytest.approx(expected)


# Unchanged results


def steps_of(reward, rows=ROWS, **options):
    """Two steps of a trainer: metrics, scores by reward, and completions."""
    trainer = trainer_of(reward, **options)
    found = []
    for _ in range(2):
        step = trainer.step(rows)
        parts = {name: part.nan_to_num(-7.0).tolist() for name, part in step.rewards.items()}
        found.append((without_times(step.metrics), parts, step.rollout.completions))
    return found


def test_results_and_arguments_are_those_of_scoring_at_the_end():
    given = {True: [], False: []}

    def reward_of(early):
        async def by_parts(prompt, completion, *, answer, messages, completion_ids, more=3):
            given[early].append((prompt, completion, answer, messages, completion_ids, more))
            await asyncio.sleep(0.001 * (len(completion) % 3))
            if answer == 1:
                return None
            return {"letters": count_letters([prompt], [completion])[0], "answer": answer}

        async def every(prompt, completion, **columns):
            given[early].append((prompt, completion, *sorted(columns)))
            columns["messages"].clear()
            return float(len(completion))

        return {
            "parts": AsyncReward(by_parts, early=early),
            "every": AsyncReward(every, early=early, max_in_flight=2),
            "letters": count_letters,
        }

    options = {"samples_per_prompt": 2, "rollout_slots": 3, "reward_weights": (0.5, 1.0, 2.0)}
    early, late = (steps_of(reward_of(flag), **options) for flag in (True, False))
    assert early == late
    assert len(given[True]) == 2 * 2 * 2 * len(PROMPTS)
    assert sorted(map(repr, given[True])) == sorted(map(repr, given[False]))


def test_results_of_servers_are_those_of_scoring_at_the_end():
    def answer(body):
        if "messages" in body and "model" in body:
            return {"choices": [{"message": {"content": f"{len(str(body)) % 11}"}}]}
        return [None if i == 2 else n for i, n in zip(body["answer"], range(9), strict=False)]

    found, bodies = [], []
    for early in (True, False):
        with local_server(answer) as server:
            http = HTTPReward(server.url, columns=("answer", "messages"), batch_size=3, early=early)
            judge = JudgeReward(server.url, "m", api_key="", column="answer", early=early)
            found.append(steps_of([http, judge, count_letters]))
            bodies.append(sorted(map(repr, server.bodies)))
    assert found[0] == found[1]
    assert bodies[0] == bodies[1]


def test_a_whole_batch_is_asked_for_at_the_end(decoding):
    seen = []

    async def batch(prompts, completions):
        seen.append((decoding.on, len(prompts)))
        return count_letters(prompts, completions)

    trainer_of(batch).step(PROMPTS)
    assert seen == [(False, len(PROMPTS))]


def test_rewards_with_more_than_requests_are_called_at_the_end(decoding):
    seen = []

    class Halved(AsyncReward):
        def __call__(self, prompts, completions, **columns):
            return [score / 2 for score in super().__call__(prompts, completions, **columns)]

    class WithModel:
        def __init__(self):
            self.model = torch.nn.Linear(1, 1)

        async def __call__(self, prompt, completion):
            seen.append(decoding.on)
            return 1.0

    async def reward(prompt, completion):
        seen.append(decoding.on)
        return 1.0

    trainer = trainer_of({"half": Halved(reward), "model": WithModel()})
    step = trainer.step(PROMPTS)
    assert seen == [False] * 2 * len(PROMPTS)
    assert step.rewards["half"].tolist() == [0.5] * len(PROMPTS)


def test_only_the_end_of_the_last_turn_is_judged():
    seen = []

    class Once:
        def __init__(self, prompt):
            self.left = 1

        def reply(self, turn):
            self.left -= 1
            return " more" if self.left >= 0 else None

    async def reward(prompt, completion):
        seen.append(completion)
        return 0.0

    policy = tiny_model()
    policy.generation_config.eos_token_id = list(range(0, VOCAB_SIZE, 6))
    config = PPOConfig(critic="baseline", max_length=24)
    ppo = PPO(policy, tiny_tokenizer(), reward, config=config, environment=Once)
    step = ppo.step(PROMPTS)
    assert any(" more" in text for text in step.rollout.completions)
    assert sorted(seen) == sorted(step.rollout.completions)


def test_evaluations_and_the_critics_training_ask_early(decoding):
    seen, asked = [], threading.Event()

    async def reward(prompt, completion):
        seen.append(decoding.on)
        asked.set()
        return 1.0

    def wait_for_reward(running):
        if running < len(PROMPTS):
            assert asked.wait(20)

    trainer = tiny_trainer(reward, max_length=12)
    decoding.at_step = wait_for_reward
    for work in (
        lambda: evaluate(trainer, PROMPTS),
        lambda: trainer.pretrain_critic(PROMPTS, 1, batch_size=5),
    ):
        seen.clear()
        asked.clear()
        work()
        assert True in seen
        assert len(seen) == len(PROMPTS)


# Rollouts that are discarded


def test_each_rollout_is_asked_for_its_own_responses_once():
    seen = []

    async def reward(prompt, completion):
        seen.append((prompt, completion))
        return count_letters([prompt], [completion])[0]

    trainer = trainer_of(reward)
    rollout = trainer.rollout(PROMPTS)
    assert seen == [], "nobody said that it will be scored"
    first = trainer.rollout(PROMPTS, scorer=trainer.scorer)
    second = trainer.rollout(PROMPTS, scorer=trainer.scorer)
    for one in (rollout, first, second, second):
        expected = count_letters(one.prompts, one.completions)
        assert trainer.scores(one).total.tolist() == pytest.approx(expected)
    pairs = [[*zip(r.prompts, r.completions, strict=True)] for r in (rollout, first, second)]
    counts = [[seen.count(pair) for pair in of_one] for of_one in pairs]
    assert counts[0] == [1] * len(PROMPTS)
    assert set(counts[1]) <= {1, 2}, "begun, and given up for the second"
    assert counts[2] == [2] * len(PROMPTS), "whoever asks for scores a second time gets new ones"


def test_resampled_batches_are_asked_for_once():
    seen = []

    async def reward(prompt, completion):
        seen.append(completion)
        return float(len(seen) % 7 == 0)

    trainer = trainer_of(reward, samples_per_prompt=2, max_resampled_batches=2)
    step = trainer.step(PROMPTS)
    assert step.metrics["prompts_resampled"] > 0
    assert len(seen) == trainer.progress.sequences_sampled


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
