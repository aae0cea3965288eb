"""AsyncReward: calls at once, their limits, tries and errors, and the loop they run on."""

from __future__ import annotations

import asyncio
import gc
import inspect
import multiprocessing
import os
import random
import signal
import threading

import pytest
import torch
from tiny_trainer import one_line

from ppo_fast.rewards import calls
from ppo_fast.rewards.asynchronous import AsyncReward, TryAgain, is_async
from ppo_fast.rewards.calls import Limits, run

PROMPTS = ["The film", "She", "Nothing in this room"]
COMPLETIONS = [" was over", " thought", " was"]


async def length(prompt, completion):
    return float(len(completion))


def failing(times, error, then=1.0):
    """An async function that raises ``error`` in its first calls, and notes how often it ran."""

    async def function(prompt, completion):
        function.calls += 1
        if function.calls <= times:
            raise error
        return then

    function.calls = 0
    return function


def test_one_call_a_response():
    assert AsyncReward(length)(PROMPTS, COMPLETIONS) == [9.0, 8.0, 4.0]
    assert AsyncReward(length)([], []) == []


def test_scores_keep_their_order_whatever_ends_first():
    async def later_first(prompt, completion, place):
        for _ in range(5 - place):
            await asyncio.sleep(0)
        return float(place)

    assert AsyncReward(later_first)(PROMPTS, COMPLETIONS, place=[0, 1, 2]) == [0.0, 1.0, 2.0]


def test_columns_come_by_entry_and_by_name():
    async def named(prompt, completion, answer, weight=2.0):
        return weight * (completion == answer)

    async def every(prompt, completion, **columns):
        return float(len(columns))

    columns = {"answer": [" was over", "x", " was"], "messages": [[], [], []]}
    assert AsyncReward(named)(PROMPTS, COMPLETIONS, **columns) == [2.0, 0.0, 2.0]
    assert AsyncReward(every)(PROMPTS, COMPLETIONS, **columns, tokens=object()) == [2.0] * 3
    assert str(inspect.signature(AsyncReward(named))) == (
        "(prompts, completions, *, answer, weight=2.0)"
    )
    assert str(inspect.signature(AsyncReward(every))) == "(prompts, completions, **columns)"
    assert str(inspect.signature(AsyncReward(length))) == "(prompts, completions)"


def test_whole_batches():
    async def batch(completions, answer, prompts):
        assert prompts == PROMPTS
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    reward = AsyncReward(batch)
    assert reward(PROMPTS, COMPLETIONS, answer=["", " thought", ""], more=[1]) == [0.0, 1.0, 0.0]
    assert str(inspect.signature(reward)) == "(prompts, completions, *, answer)"


def test_parts_and_responses_that_are_not_judged():
    async def parts(prompt, completion):
        return None if prompt == "She" else {"a": 1.0, "b": len(completion)}

    async def mixed(prompt, completion):
        return 1.0 if prompt == "She" else {"a": 1.0}

    async def some(prompt, completion):
        return None if prompt == "She" else 1.0

    assert AsyncReward(parts)(PROMPTS, COMPLETIONS) == {"a": [1.0, None, 1.0], "b": [9, None, 4]}
    assert AsyncReward(some)(PROMPTS, COMPLETIONS) == [1.0, None, 1.0]
    with pytest.raises(ValueError, match=r"mixed: got 1.0 for one response and \['a'\]"):
        AsyncReward(mixed)(PROMPTS, COMPLETIONS)


def test_no_more_calls_at_once_than_max_in_flight():
    running, most = 0, 0

    async def counted(prompt, completion):
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(5):
            await asyncio.sleep(0)
        running -= 1
        return 0.0

    for limit in (1, 3):
        most = 0
        AsyncReward(counted, max_in_flight=limit)(["p"] * 12, ["c"] * 12)
        assert most == limit


@pytest.mark.parametrize("error", [ConnectionError("x"), TimeoutError("x"), TryAgain("x")])
def test_calls_are_tried_again(error):
    function = failing(2, error)
    assert AsyncReward(function, backoff=0)(["p"], ["c"]) == [1.0]
    assert function.calls == 3


def test_errors_of_httpx_are_tried_again():
    httpx = pytest.importorskip("httpx")
    function = failing(1, httpx.ReadError("x"))
    assert AsyncReward(function, backoff=0)(["p"], ["c"]) == [1.0]


def test_when_tries_are_used_up():
    function = failing(9, ConnectionError("the\nserver left"))
    with pytest.raises(RuntimeError) as caught:
        AsyncReward(function, backoff=0, retries=2)(["p" * 200], ["c"])
    assert function.calls == 3
    text = str(caught.value)
    expected = f"function failed for the prompt '{'p' * 60}...' after 3 tries: ConnectionError: the"
    assert text.startswith(expected)
    assert __file__ in text, "where it arose"
    assert one_line(caught)
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_mistakes_are_not_tried_again():
    function = failing(9, KeyError("answer"))
    with pytest.raises(RuntimeError, match=r"'She' after 1 try: KeyError: 'answer'"):
        AsyncReward(function, backoff=0)(["She"], ["c"])
    assert function.calls == 1
    function = failing(1, KeyError("answer"))
    assert AsyncReward(function, backoff=0, retry_on=[KeyError])(["She"], ["c"]) == [1.0]


def test_a_call_that_takes_too_long():
    calls = 0

    async def slow(prompt, completion):
        nonlocal calls
        calls += 1
        if prompt == "She":
            await asyncio.sleep(60)
        return 1.0

    with pytest.raises(TimeoutError, match=r"slow failed for .*'She' after 2 tries: no answer in"):
        AsyncReward(slow, timeout=0.02, retries=1, backoff=0)(PROMPTS, COMPLETIONS)
    assert calls == 4


def test_a_failed_call_cancels_the_others():
    ended = []

    async def one_fails(prompt, completion):
        try:
            if prompt == "She":
                await asyncio.sleep(0.01)
                raise ValueError("no")
            await asyncio.sleep(60)
        finally:
            ended.append(prompt)

    with pytest.raises(RuntimeError, match="ValueError: no"):
        AsyncReward(one_fails)(PROMPTS, COMPLETIONS)
    assert sorted(ended) == sorted(PROMPTS), "before the error was raised"
    assert left_running() == set()


def left_running():
    """The tasks on the loop, but this one."""

    async def tasks():
        return asyncio.all_tasks() - {asyncio.current_task()}

    return run(tasks)


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError(), KeyboardInterrupt()])
def test_errors_that_would_end_the_loop(error):
    thread = calls._get_loop().thread
    with pytest.raises(RuntimeError, match=f"after 1 try: {type(error).__name__}"):
        AsyncReward(failing(9, error))(["p"], ["c"])
    assert AsyncReward(length)(["p"], ["c"]) == [1.0]
    assert calls._get_loop().thread is thread
    assert thread.is_alive()


def test_waits_grow_have_a_bound_and_heed_the_server():
    limits = Limits(backoff=1.0)
    for tries, low, high in [(1, 0.5, 1), (2, 1, 2), (4, 4, 8), (7, 30, 60), (5000, 30, 60)]:
        waits = [limits.seconds(tries, ConnectionError()) for _ in range(50)]
        assert min(waits) >= low
        assert max(waits) <= high
        assert len(set(waits)) > 40
    assert limits.seconds(1, TryAgain("x", after=7.0)) == 7.0
    assert limits.seconds(1, TryAgain("x", after=1e9)) == calls.LONGEST_WAIT


def test_no_draw_of_the_training_changes():
    before = random.getstate(), torch.get_rng_state()
    AsyncReward(failing(2, ConnectionError()), backoff=1e-9)(["p"], ["c"])
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_one_loop_for_all_batches_and_threads():
    loops = set()

    async def note(prompt, completion):
        loops.add(id(asyncio.get_running_loop()))
        return 0.0

    reward = AsyncReward(note)
    reward(PROMPTS, COMPLETIONS)
    threads = [threading.Thread(target=reward, args=(PROMPTS, COMPLETIONS)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loops) == 1


def test_inside_of_a_running_loop():
    async def cell():
        return AsyncReward(length)(PROMPTS, COMPLETIONS)

    assert asyncio.run(cell()) == [9.0, 8.0, 4.0]


def test_a_reward_that_calls_another_is_refused():
    async def nested(prompt, completion):
        return AsyncReward(length)([prompt], [completion])[0]

    with pytest.raises(RuntimeError, match="await its function"):
        AsyncReward(nested)(["p"], ["c"])


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_ctrl_c_cancels_what_is_in_flight():
    cancelled = []

    async def interrupted(prompt, completion):
        if prompt == "She":
            os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(prompt)
            raise

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            AsyncReward(interrupted)(PROMPTS, COMPLETIONS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(cancelled) == sorted(PROMPTS)
    assert left_running() == set()


def of_child(queue):
    queue.put(AsyncReward(length)(PROMPTS, COMPLETIONS))
    gc.collect()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_a_loop_of_its_own():
    AsyncReward(length)(PROMPTS, COMPLETIONS)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=of_child, args=(queue,))
    with calls._lock:  # as another thread may at any moment
        child.start()
    child.join(20)
    child.kill()
    assert child.exitcode == 0
    assert queue.get() == [9.0, 8.0, 4.0]
    assert AsyncReward(length)(PROMPTS, COMPLETIONS) == [9.0, 8.0, 4.0]


def test_what_is_async():
    class Object:
        async def __call__(self, prompt, completion):
            return 0.0

    assert is_async(length)
    assert is_async(Object())
    assert not is_async(len)
    assert not is_async(AsyncReward(length)), "it is called as others are"
    assert AsyncReward(Object()).name == "Object"
    assert AsyncReward(Object())(["p"], ["c"]) == [0.0]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"timeout": 0}, "timeout: got 0, expected a number above 0"),
        ({"max_in_flight": 0}, "max_in_flight: got 0"),
        ({"retries": -1}, "retries: got -1"),
        ({"backoff": float("nan")}, "backoff: got nan"),
        ({"retry_on": ("x",)}, "retry_on: got 'x', expected classes"),
    ],
)
def test_limits_out_of_range(option, message):
    with pytest.raises(ValueError, match=message):
        AsyncReward(length, **option)


def test_what_is_no_function():
    async def of_tokens(prompt, completion, tokens):
        return 0.0

    with pytest.raises(TypeError, match="function: got 3, expected an async function"):
        AsyncReward(3)
    with pytest.raises(ValueError, match="of_tokens: tokens are those of a whole batch"):
        AsyncReward(of_tokens)
    with pytest.raises(RuntimeError, match="after 1 try: TypeError"):
        AsyncReward(lambda prompt, completion: 1.0)(["p"], ["c"])


def test_texts_are_passed_by_name_where_there_are_names():
    async def swapped(completion, prompt):
        return float(len(completion) - 10 * len(prompt))

    async def alone(completion, answer):
        return float(len(completion) + answer)

    texts = (["aa", "b"], ["xyz", "y"])
    assert AsyncReward(swapped)(*texts) == [-17.0, -9.0]
    assert AsyncReward(alone)(*texts, answer=[1, 2]) == [4.0, 3.0]
