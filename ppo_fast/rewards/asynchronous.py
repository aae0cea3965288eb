"""Rewards that are async functions: called once a response, all of a batch at once."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

from ppo_fast.rewards.calls import Limits, TryAgain
from ppo_fast.rewards.columns import for_prompt, signature_with
from ppo_fast.rewards.requests import Request, ask
from ppo_fast.user_code import parameters

__all__ = ["AsyncReward", "TryAgain", "is_async"]


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
        early: whether a response is judged as soon as it has ended, while others are still sampled;
            False: when all have ended, as a function must that runs the trainer's own models.

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
        early: bool = True,
    ) -> None:
        if not callable(function) or isinstance(function, type):
            raise TypeError(f"function: got {function!r}, expected an async function")
        self.limits = Limits(max_in_flight, timeout, retries, backoff, tuple(retry_on))
        self.function, self.early = function, early
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
        return ask(self, prompts, completions, columns)

    # As requests.ByRequests says

    @property
    def who(self) -> str:
        return self.name

    @property
    def responses_per_request(self) -> int | None:
        return None if self._texts else 1

    def taken(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        chosen = columns if self._takes_all else [n for n in self._columns if n in columns]
        left_out = () if self._texts else ("tokens", *self._positional)  # tokens are the batch's
        return {name: columns[name] for name in chosen if name not in left_out}

    def request_for(
        self, prompts: list[str], completions: list[str], columns: Mapping[str, Any]
    ) -> Request:
        if self._texts:
            both = {"prompts": prompts, "completions": completions}
            given = {name: both[name] for name in self._texts}
            return Request(_batch(prompts), lambda _: self.function(**given, **columns))
        (prompt,), (completion,) = prompts, completions
        named = {name: entry for name, (entry,) in columns.items()}
        subject = for_prompt(prompt)
        if not self._single:
            return Request(subject, lambda _: self.function(prompt, completion, **named))
        texts = {"prompt": prompt, "completion": completion}
        named |= {name: texts[name] for name in self._single}
        return Request(subject, lambda _: self.function(**named))

    def shared(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    def joined(self, answers: list[Any]) -> Any:
        return answers[0] if self._texts and answers else _joined(answers, self.name)


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
