"""Rewards that are async functions: called once a response, all of a batch at once."""

from __future__ import annotations

import asyncio
import atexit
import inspect
import os
import random
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ppo_fast.checks import check_fields, number, whole
from ppo_fast.rewards.columns import for_prompt, signature_with
from ppo_fast.user_code import parameters, place_of_error

LONGEST_WAIT = 60.0
"""Max seconds between two tries, whatever the back-off or a server asks for."""
CANCEL_SECONDS = 5.0
"""Max seconds to wait for cancelled calls to end, after a Ctrl-C."""

T = TypeVar("T")


class CallError(Exception):
    """Raised by an async reward, with a message that says all: it is not tried again."""


class TryAgain(CallError):
    """Raised by an async reward: this call may succeed later, so it is tried again.

    Args:
        message: what went wrong.
        after: seconds to wait at least; None: the back-off's.
    """

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


@dataclass(frozen=True)
class Limits:
    """Limits of calls that run at once. Values out of range raise ValueError."""

    max_in_flight: int = whole(32)
    """Calls at once. One that waits for its next try counts."""
    timeout: float = number(60.0, above=0)
    """Seconds that one try may take."""
    retries: int = whole(3, at_least=0)
    """Tries after the first."""
    backoff: float = number(1.0, at_least=0)
    """Seconds before the second try. They double with each further one, up to 60, and are
    multiplied by a random number in [0.5, 1], so that calls do not come back together."""
    retry_on: tuple[type[Exception], ...] = (TimeoutError, ConnectionError)
    """Errors after which a call is tried again, beside TryAgain and httpx.TransportError."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "retry_on", tuple(self.retry_on))
        check_fields(self)
        for kind in self.retry_on:
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                raise ValueError(f"retry_on: got {kind!r}, expected classes of exceptions")

    def waits_for(self, error: Exception) -> bool:
        """Return whether a call that raised ``error`` is tried again."""
        httpx = sys.modules.get("httpx")  # who raises its errors has loaded it
        of_httpx = (httpx.TransportError,) if httpx is not None else ()
        return isinstance(error, (TryAgain, *self.retry_on, *of_httpx))

    def seconds(self, tries: int, error: Exception) -> float:
        """Return the seconds to wait after that many tries, the last of which raised ``error``."""
        pause = min(self.backoff * 2.0 ** min(tries - 1, 60), LONGEST_WAIT)
        pause *= _jitter.uniform(0.5, 1.0)
        return min(max(pause, getattr(error, "after", None) or 0.0), LONGEST_WAIT)


# A generator of its own: draws from the global ones would change those of the training.
_jitter = random.Random()


class AsyncReward:
    """An async function as a reward: awaited once a response, all of a batch at once.

    ``function(prompt, completion, **columns)`` gets, of each column that its signature names (of
    all with ``**kwargs``), the response's entry. It returns a number, None for a response that it
    does not judge, or a dict of numbers, the parts of the score. A function with a parameter named
    ``completions`` is awaited once with the whole batch instead, with lists, and returns a list.

    Calls run on one event loop in a thread of its own, which lives as long as the process: a client
    that the function keeps stays on its loop, and the caller may itself run in a loop (Jupyter).
    The function must not block: while it computes, no other call goes on and no time limit works.

    A failed call is tried again after TimeoutError, ConnectionError, httpx.TransportError and
    ``TryAgain``, which the function may raise; another error is taken for a mistake in the function
    and ends the batch at once. When a call has failed, the others are cancelled.

    Args:
        function: the async function, or an object with an async ``__call__``. Its ``needs``, names
            of columns, are passed on.
        max_in_flight: calls at once.
        timeout: seconds that one try may take.
        retries: tries after the first.
        backoff: seconds before the second try, doubled with each further one up to 60, and
            multiplied by a random number in [0.5, 1] that no generator of the training gives.
        retry_on: errors after which a call is tried again, in place of TimeoutError and
            ConnectionError. (TimeoutError is also what the time limit raises.)

    Raises:
        TypeError: ``function`` cannot be called.
        ValueError: a limit is out of range, or a function that is called once a response takes
            ``tokens``, which are those of the batch.
    """

    def __init__(
        self,
        function: Callable[..., Awaitable[Any]],
        *,
        max_in_flight: int = 32,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        retry_on: Sequence[type[Exception]] = (TimeoutError, ConnectionError),
    ) -> None:
        if not callable(function) or isinstance(function, type):
            raise TypeError(f"function: got {function!r}, expected an async function")
        self.limits = Limits(max_in_flight, timeout, retries, backoff, tuple(retry_on))
        self.function = function
        self.name = str(
            getattr(function, "name", None)
            or getattr(function, "__name__", None)
            or type(function).__name__
        )
        self.needs: tuple[str, ...] = tuple(getattr(function, "needs", ()))
        found, columns = parameters(function), _columns_of(function)
        self._takes_all, self._columns = found.any, [c.name for c in columns]
        # of one response: by name, if "completion" is one, or else the first two by position
        single = "completion" in found.names
        self._single = [n for n in ("prompt", "completion") if single and n in found.names]
        self._positional = ("prompt", "completion") if single else found.positional[:2]
        # which of both texts it takes by name; none: it is called once a response
        by_name = "completions" in found.names
        self._texts = [n for n in ("prompts", "completions") if by_name and n in found.names]
        if "tokens" in self._columns and not self._texts:
            raise ValueError(
                f"{self.name}: tokens are those of a whole batch, and this function is called once "
                "a response; let it take completion_ids instead, or name its parameter completions"
            )
        self.__signature__ = signature_with(columns)

    def __repr__(self) -> str:
        return f"AsyncReward({self.name})"

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> Any:
        """Return a list with a score a response, or a dict of such lists.

        Raises:
            RuntimeError: a call failed, after all its tries; the prompt is named.
            TimeoutError: the last of these tries took longer than the time limit.
            ValueError: the calls returned dicts of different names.
        """
        if not self._takes_all:
            columns = {name: columns[name] for name in self._columns if name in columns}
        if self._texts:
            both = {"prompts": prompts, "completions": completions}
            given = {name: both[name] for name in self._texts}
            calls = [lambda: self.function(**given, **columns)]
            return run(lambda: call_all(calls, self.limits, self.name, [_batch(prompts)]))[0]
        columns.pop("tokens", None)  # not by response
        columns = {name: c for name, c in columns.items() if name not in self._positional}
        calls = [
            self._bound(p, c, {name: column[i] for name, column in columns.items()})
            for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
        ]
        subjects = [for_prompt(prompt) for prompt in prompts]
        return _joined(run(lambda: call_all(calls, self.limits, self.name, subjects)), self.name)

    def _bound(
        self, prompt: str, completion: str, columns: dict[str, Any]
    ) -> Callable[[], Awaitable[Any]]:
        """Return the call for one response."""
        if not self._single:
            return lambda: self.function(prompt, completion, **columns)
        texts = {"prompt": prompt, "completion": completion}
        named = {name: texts[name] for name in self._single}
        return lambda: self.function(**named, **columns)


def is_async(reward: Any) -> bool:
    """Return whether ``reward`` is an async function, or an object with an async ``__call__``."""
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(
        getattr(type(reward), "__call__", None)  # noqa: B004 - the method itself is looked at
    )


def _columns_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of ``function`` that columns are passed to, by name."""
    try:
        found = inspect.signature(function).parameters.values()
    except ValueError:  # of code that is not Python
        return []
    columns = [p for p in found if p.kind is not p.VAR_POSITIONAL]
    for one, other in (("completions", "prompts"), ("completion", "prompt")):
        if any(p.name == one and p.kind is not p.POSITIONAL_ONLY for p in columns):
            columns = [p for p in columns if p.name not in (one, other)]
            break
    else:
        positional = [p for p in columns if p.kind is not p.VAR_KEYWORD][:2]
        columns = [p for p in columns if p not in positional]
    return [p if p.kind is p.VAR_KEYWORD else p.replace(kind=p.KEYWORD_ONLY) for p in columns]


def _joined(scores: list[Any], name: str) -> Any:
    """Return scores as they are, or dicts of numbers as a dict of lists."""
    parts = [score for score in scores if isinstance(score, dict)]
    if not parts:
        return scores
    names = list(parts[0])
    for score in scores:
        if score is not None and (not isinstance(score, dict) or set(score) != set(names)):
            got = list(score) if isinstance(score, dict) else score
            raise ValueError(f"{name}: got {got!r} for one response and {names} for another")
    return {part: [None if score is None else score[part] for score in scores] for part in names}


def _batch(prompts: Sequence[str]) -> str:
    return f"a batch of {len(prompts)}"


# Calls


async def call_all(
    calls: Sequence[Callable[[], Awaitable[T]]],
    limits: Limits,
    name: str,
    subjects: Sequence[str],
) -> list[T]:
    """Await all calls at once, within the limits, and return their results in order.

    The first that fails cancels the others, and all have ended when this returns.

    Args:
        calls: each makes a new awaitable, one a try.
        name: of what is called, for errors.
        subjects: what each call is for, for errors.

    Raises:
        RuntimeError, TimeoutError: a call failed; the message has ``name`` and its subject.
    """
    slots = asyncio.Semaphore(limits.max_in_flight)

    async def in_turn(call: Callable[[], Awaitable[T]], subject: str) -> T:
        async with slots:
            return await _with_tries(call, limits, name, subject)

    try:
        async with asyncio.TaskGroup() as group:
            pairs = zip(calls, subjects, strict=True)
            tasks = [group.create_task(in_turn(call, subject)) for call, subject in pairs]
    except BaseExceptionGroup as failed:
        first = failed.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]


async def _with_tries(
    call: Callable[[], Awaitable[T]], limits: Limits, name: str, subject: str
) -> T:
    tries = 0
    while True:
        tries += 1
        try:
            async with asyncio.timeout(limits.timeout):
                return await call()
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # by us
            last: BaseException = error
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # the last two end a loop
            last = error
        if tries > limits.retries or not (isinstance(last, Exception) and limits.waits_for(last)):
            break
        await asyncio.sleep(limits.seconds(tries, last))
    what = str(last) if isinstance(last, CallError) else f"{type(last).__name__}: {last}"
    if isinstance(last, TimeoutError) and not str(last):
        what = f"no answer in {limits.timeout:g} s"
    kind = TimeoutError if isinstance(last, TimeoutError) else RuntimeError
    count = "1 try" if tries == 1 else f"{tries} tries"
    place = place_of_error(last)
    line = " ".join(what.split())
    raise kind(f"{name} failed for {subject} after {count}: {line}{place}") from last


# The event loop


class _Loop:
    """An event loop that runs in a daemon thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(
            target=self.loop.run_forever, name="ppo_fast async rewards", daemon=True
        )
        self.thread.start()

    def close(self) -> None:
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(CANCEL_SECONDS)
        if not self.thread.is_alive():
            self.loop.close()


_current: _Loop | None = None
_lock = threading.Lock()
_of_parents: list[_Loop | None] = []


def _get_loop() -> _Loop:
    """Return this process's loop; it is made when it is first needed."""
    global _current
    with _lock:
        if _current is None or not _current.thread.is_alive():
            _current = _Loop()
        return _current


def _after_fork() -> None:
    """In a child process: forget the loop, whose thread is the parent's."""
    global _current, _lock
    _of_parents.append(_current)  # kept: closing it here would unregister the parent's sockets
    _current, _lock = None, threading.Lock()


@atexit.register
def _at_exit() -> None:
    if _current is not None:
        _current.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run(make: Callable[[], Awaitable[T]]) -> T:
    """Run what ``make`` returns on the event loop of async rewards, and wait for its result.

    Any thread may call it, one that runs an event loop too. Where the wait is interrupted (Ctrl-C),
    the work is cancelled before the interrupt is raised.

    Raises:
        RuntimeError: the caller is itself an async reward: it would wait for itself.
    """
    ours = _get_loop()
    if threading.current_thread() is ours.thread:
        raise RuntimeError("an async reward called a reward of the same kind; await its function")
    stopped, ended = threading.Event(), threading.Event()
    tasks: list[asyncio.Task[Any] | None] = []

    async def work() -> T:
        try:
            tasks.append(asyncio.current_task())
            if stopped.is_set():
                raise asyncio.CancelledError
            return await make()
        finally:
            ended.set()

    def cancel() -> None:
        for task in tasks:
            if task is not None:
                task.cancel()

    try:  # an interrupt may come anywhere in it, and then the work has begun or has not
        return asyncio.run_coroutine_threadsafe(work(), ours.loop).result()
    except BaseException:
        if not ended.is_set():
            stopped.set()
            ours.loop.call_soon_threadsafe(cancel)
            ended.wait(CANCEL_SECONDS)
        raise
