"""Calls of async functions at once, within limits, on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import atexit
import os
import random
import sys
import threading
from collections.abc import AsyncIterable, Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from ppo_fast.checks import check_fields, number, whole
from ppo_fast.user_code import place_of_error

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


# Calls


class Call(NamedTuple, Generic[T]):
    """A call of an async function.

    make: makes a new awaitable, one a try.
    subject: what the call is for, for errors.
    """

    make: Callable[[], Awaitable[T]]
    subject: str


async def call_all(calls: AsyncIterable[Call[T]], limits: Limits, name: str) -> list[T]:
    """Await all calls at once, within the limits, and return their results in order.

    Each begins as it comes. The first that fails cancels the others, and all have ended when this
    returns.

    Args:
        calls: the calls, in an order.
        name: of what is called, for errors.

    Raises:
        RuntimeError, TimeoutError: a call failed; the message has ``name`` and its subject.
    """
    slots = asyncio.Semaphore(limits.max_in_flight)

    async def in_turn(call: Call[T]) -> T:
        async with slots:
            return await _with_tries(call, limits, name)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(in_turn(call)) async for call in calls]
    except BaseExceptionGroup as failed:
        first = failed.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]


async def _with_tries(call: Call[T], limits: Limits, name: str) -> T:
    tries = 0
    while True:
        tries += 1
        try:
            async with asyncio.timeout(limits.timeout):
                return await call.make()
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
    raise kind(f"{name} failed for {call.subject} after {count}: {line}{place}") from last


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


class Work(Generic[T]):
    """Work on the event loop of async rewards, which any thread may wait for.

    Args:
        make: makes the awaitable that is the work.

    Raises:
        RuntimeError: the caller is itself an async reward: it would wait for itself.
    """

    def __init__(self, make: Callable[[], Awaitable[T]]) -> None:
        self._make, self._ours = make, _get_loop()
        if threading.current_thread() is self._ours.thread:
            raise RuntimeError(
                "an async reward called a reward of the same kind; await its function"
            )
        self._stopped, self._ended = threading.Event(), threading.Event()
        self._task: asyncio.Task[Any] | None = None
        self._future: Future[T] | None = None

    def start(self) -> None:
        """Begin the work."""
        self._future = asyncio.run_coroutine_threadsafe(self._run(), self._ours.loop)

    def result(self) -> T:
        """Wait until the work has ended, and return its result or raise its error."""
        assert self._future is not None
        return self._future.result()

    def call_soon(self, call: Callable[[], None]) -> None:
        """Call a function on the loop, where the work can see what it does."""
        self._ours.loop.call_soon_threadsafe(call)

    def cancel(self) -> None:
        """Cancel the work, if it has not ended, and wait until it has, up to CANCEL_SECONDS."""
        if not self._ended.is_set():
            self._stopped.set()
            self.call_soon(self._cancel)
            self._ended.wait(CANCEL_SECONDS)

    async def _run(self) -> T:
        try:
            self._task = asyncio.current_task()
            if self._stopped.is_set():
                raise asyncio.CancelledError
            return await self._make()
        finally:
            self._ended.set()

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


def run(make: Callable[[], Awaitable[T]]) -> T:
    """Run what ``make`` returns on the event loop of async rewards, and wait for its result.

    Any thread may call it, one that runs an event loop too. Where the wait is interrupted (Ctrl-C),
    the work is cancelled before the interrupt is raised.

    Raises:
        RuntimeError: the caller is itself an async reward: it would wait for itself.
    """
    work = Work(make)
    try:  # an interrupt may come anywhere in it, and then the work has begun or has not
        work.start()
        return work.result()
    except BaseException:
        work.cancel()
        raise
