"""A reward that a server computes."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

from ppo_fast.checks import check_counts
from ppo_fast.rewards.calls import Limits
from ppo_fast.rewards.columns import column, for_prompt, signature_with
from ppo_fast.rewards.endpoint import Endpoint
from ppo_fast.rewards.requests import Request, ask

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

Scores = list[float | None]
EXPECTED = '{"scores": [...]} with a number a response'
MADE_UP = "0"
"""Entry of every column in the request that check() sends."""


class HTTPReward:
    """A server's scores: one POST of JSON a batch, or for each part of it.

    The request is ``{"prompts": [...], "completions": [...]}`` and a list for each of ``columns``;
    the answer ``{"scores": [...]}``, ``{"rewards": [...]}`` or the list alone, with a finite number
    a response, or null for one that is not judged.

    Tried again, with the server's Retry-After up to 60 seconds: lost connections, time-outs and the
    statuses 408, 425, 429 and from 500. Redirects are not followed. An answer has at most 16 MiB.

    Args:
        url: of http or https. Secrets belong into ``headers``, which no error shows: httpx logs
            URLs.
        columns: names of the columns of the data that are sent too; "messages" and
            "completion_ids" can be among them.
        batch_size: responses in one request; None: all of a batch.
        headers: more headers, such as ``{"Authorization": "Bearer ..."}``.
        timeout: seconds that one try may take.
        retries: tries after the first.
        backoff: seconds before the second try; see AsyncReward.
        max_in_flight: requests at once.
        early: whether a request is sent as soon as its responses have ended, while others are still
            sampled; False: when all have ended.

    Raises:
        ModuleNotFoundError: httpx is not installed: ``pip install 'ppo_fast[http]'``.
        ValueError: an argument is out of range.
    """

    name = "http"

    def __init__(
        self,
        url: str,
        *,
        columns: Sequence[str] = (),
        batch_size: int | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        max_in_flight: int = 8,
        early: bool = True,
    ) -> None:
        if isinstance(columns, str):
            raise ValueError(f"columns: got the text {columns!r}, expected a list of names")
        if batch_size is not None:
            check_counts(batch_size=batch_size)
        self.limits = Limits(max_in_flight, timeout, retries, backoff)
        self.batch_size, self.needs, self.early = batch_size, tuple(columns), early
        self._endpoint = Endpoint("HTTPReward", url, headers)
        self.__signature__ = signature_with(self.needs)

    def __repr__(self) -> str:
        return f"HTTPReward({self._endpoint.shown!r})"

    def check(self) -> None:
        """Ask for the score of one made-up response, to find a wrong or broken server early.

        Columns are the text "0", which a server may refuse: with columns, an answer of 400, 422 or
        500 is logged as a warning and not raised.

        Raises:
            RuntimeError, TimeoutError: the server cannot be reached or answers otherwise.
        """
        try:
            self(["Hello"], [" world"], **{name: [MADE_UP] for name in self.needs})
        except RuntimeError as error:
            status = getattr(error.__cause__, "status", None)
            if not self.needs or status not in (400, 422, 500):
                raise
            logger.warning("%s; with real columns it may not", error)

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> Scores:
        """Return the server's scores, one a response.

        Raises:
            RuntimeError: a request failed, after all its tries.
            TimeoutError: the last of these tries took longer than the time limit.
            ValueError: a column is not there, or cannot be written as JSON.
        """
        scores: Scores = ask(self, prompts, completions, columns)
        return scores

    # As requests.ByRequests says

    @property
    def who(self) -> str:
        return repr(self)

    @property
    def responses_per_request(self) -> int | None:
        return self.batch_size

    def taken(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        return {name: column(columns, name, "HTTPReward") for name in self.needs}

    def request_for(
        self, prompts: list[str], completions: list[str], columns: Mapping[str, Any]
    ) -> Request:
        body = _as_json({"prompts": prompts, "completions": completions, **columns})
        count = len(prompts)
        subject = f"{count} response(s), the first to {for_prompt(prompts[0])},"
        return Request(subject, partial(self._ask, body=body, count=count))

    def shared(self) -> AbstractAsyncContextManager[httpx.AsyncClient]:
        return self._endpoint.client()

    def joined(self, answers: list[Scores]) -> Scores:
        return [score for scores in answers for score in scores]

    async def _ask(self, client: httpx.AsyncClient, body: bytes, count: int) -> Scores:
        answer = await self._endpoint.post(client, body, EXPECTED)
        scores = answer
        if isinstance(answer, dict):
            scores = answer.get("scores", answer.get("rewards"))
        if not isinstance(scores, list):
            raise self._endpoint.refused(answer, EXPECTED)
        if len(scores) != count:
            raise self._endpoint.refused(answer, f"{count} scores, not {len(scores)}")
        if not all(score is None or _is_finite(score) for score in scores):
            raise self._endpoint.refused(answer, "finite numbers, or null")
        return [None if score is None else float(score) for score in scores]


def _is_finite(score: Any) -> bool:
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        return False
    try:
        return math.isfinite(score)
    except OverflowError:
        return False


def _as_json(lists: Mapping[str, Any]) -> bytes:
    """Return lists as JSON; numpy's and torch's numbers and arrays become Python's."""
    texts = []
    for name, values in lists.items():
        try:
            text = json.dumps(values, default=_plain, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"column {name!r} cannot be written as JSON ({error})") from error
        texts.append(f"{json.dumps(name)}: {text}")
    return f"{{{', '.join(texts)}}}".encode()


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"it holds a {type(value).__name__}")
