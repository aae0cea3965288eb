"""Ask for the scores of a batch by requests that run at once, on the loop of async rewards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ppo_fast.rewards.calls import Call, Limits, Work, call_all


class Request(NamedTuple):
    """One request for scores.

    subject: what it is for, for errors.
    ask: given what the requests of a batch share, it makes a new awaitable of the answer, one a
        try.
    """

    subject: str
    ask: Callable[[Any], Awaitable[Any]]


@runtime_checkable
class ByRequests(Protocol):
    """A reward that asks for the scores of a batch by requests.

    who: name of the reward in errors.
    limits: of the requests.
    early: whether a request may be sent before other responses of the batch have ended.
    """

    limits: Limits
    early: bool

    @property
    def who(self) -> str: ...

    @property
    def responses_per_request(self) -> int | None:
        """Number of responses in one request; None: all of a batch."""
        ...

    def taken(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns that requests send, or raise ValueError where one lacks."""
        ...

    def request_for(
        self, prompts: list[str], completions: list[str], columns: Mapping[str, Any]
    ) -> Request:
        """Return the request for some responses; ``columns`` are those of ``taken`` for them."""
        ...

    def shared(self) -> AbstractAsyncContextManager[Any]:
        """Return what the requests of a batch share, such as a client: open until all ended."""
        ...

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> Any:
        """Return the scores of a batch, by ``ask``."""
        ...

    def joined(self, answers: list[Any]) -> Any:
        """Return the scores of a batch, from the answers to its requests in order."""
        ...


def parts_of(reward: ByRequests, count: int) -> list[range]:
    """Return the rows of each request for a batch of ``count`` responses."""
    size = reward.responses_per_request or max(count, 1)
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def request_for_rows(
    reward: ByRequests,
    rows: range,
    prompts: list[str],
    completions: list[str],
    columns: Mapping[str, Any],
) -> Request:
    """Return the request for ``rows`` of a batch, whose lists are given whole."""
    if reward.responses_per_request is None:
        return reward.request_for(prompts, completions, columns)
    return reward.request_for(
        [prompts[i] for i in rows],
        [completions[i] for i in rows],
        {name: [column[i] for i in rows] for name, column in columns.items()},
    )


def ask(
    reward: ByRequests, prompts: list[str], completions: list[str], columns: Mapping[str, Any]
) -> Any:
    """Return the scores of a batch.

    Raises:
        RuntimeError, TimeoutError: a request failed, after all its tries.
        ValueError: a column is not there, or cannot be sent; then nothing is sent.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"got {len(prompts)} prompts and {len(completions)} completions")
    taken = reward.taken(columns)
    parts = parts_of(reward, len(prompts))
    requests = [request_for_rows(reward, rows, prompts, completions, taken) for rows in parts]
    asking = Asking(reward)
    try:  # an interrupt may come anywhere in it
        asking.send(*requests)
        return reward.joined(asking.answers())
    except BaseException:
        asking.cancel()
        raise


class Asking:
    """Requests of one batch, under way on the loop of async rewards.

    The first that fails cancels the others. Each thread may call it, but one at a time.

    Args:
        reward: whose requests they are.
    """

    def __init__(self, reward: ByRequests) -> None:
        self._reward = reward
        self._requests: asyncio.Queue[Request | None] = asyncio.Queue()
        self._work: Work[list[Any]] | None = None

    def send(self, *requests: Request) -> None:
        """Send requests, as soon as ``max_in_flight`` allows; it does not wait."""
        if not requests:
            return
        if self._work is None:
            self._work = Work(self._answers)
            self._work.start()
        self._work.call_soon(partial(self._put, requests))

    def answers(self) -> list[Any]:
        """Wait for the answers to all requests, and return them in the order of ``send``.

        Raises:
            RuntimeError, TimeoutError: a request failed, after all its tries.
        """
        if self._work is None:
            return []
        self._work.call_soon(partial(self._requests.put_nowait, None))
        return self._work.result()

    def cancel(self) -> None:
        """Cancel requests that have no answer yet, and wait until they have ended."""
        if self._work is not None:
            self._work.cancel()

    def _put(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._requests.put_nowait(request)

    async def _answers(self) -> list[Any]:
        async with self._reward.shared() as shared:
            return await call_all(self._calls(shared), self._reward.limits, self._reward.who)

    async def _calls(self, shared: Any) -> AsyncIterator[Call[Any]]:
        while (request := await self._requests.get()) is not None:
            yield Call(partial(request.ask, shared), request.subject)
