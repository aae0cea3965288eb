"""Rewards that send requests are asked for each response as it ends, with unchanged results."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from early_rewards import ROWS, trainer_of
from local_server import local_server
from tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS, count_letters, tiny_trainer, without_times

from ppo_fast import PPO, PPOConfig
from ppo_fast.rewards import AsyncReward, HTTPReward, JudgeReward
from ppo_fast.runs.evaluation import evaluate

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
