"""Send the requests for scores of responses that have ended, while others are still sampled."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ppo_fast.data.ended import Ended
from ppo_fast.data.examples import Example
from ppo_fast.data.rollout import Rollout, columns_of, messages_of
from ppo_fast.rewards.functions import given_to, missing_columns, name_of
from ppo_fast.rewards.requests import Asking, ByRequests, ask, parts_of, request_for_rows


def asks_early(reward: Any, examples: Sequence[Example]) -> bool:
    """Return whether a reward sends requests that need not wait for all responses.

    A subclass with a ``__call__`` of its own does more than send them, and is called as it is.
    """
    return (
        isinstance(reward, ByRequests)
        and type(reward).__call__.__module__.startswith("ppo_fast.")
        and reward.early
        and reward.responses_per_request is not None
        and not missing_columns(reward, columns_of(examples))
    )


class Asked:
    """Rewards that are asked for the scores of a rollout while it is sampled.

    Args:
        rewards: those that ask early, by name.
        examples: of the rollout's rows.

    Attributes:
        calls: by name, what gives the scores in place of the reward, once.
    """

    def __init__(self, rewards: Mapping[str, Any], examples: Sequence[Example]) -> None:
        self.calls = {name: EarlyCall(one, len(examples)) for name, one in rewards.items()}
        self._examples, self._columns = examples, columns_of(examples)
        self._ended: dict[int, Ended] = {}

    def note(self, ended: Ended) -> None:
        """Send the requests that waited for this response alone."""
        if ended.row in self._ended:
            return
        self._ended[ended.row] = ended
        for call in self.calls.values():
            if (rows := call.complete(ended.row)) is not None:
                call.send(rows, *self._batch(rows))

    def check(self, rollout: Rollout) -> None:
        """Raise RuntimeError if the rollout has another response than one that was noted."""
        ids, lengths = rollout.tokens.response_ids.tolist(), rollout.tokens.response_lengths
        for row, noted in self._ended.items():
            found = rollout.prompts[row], rollout.completions[row], ids[row][: int(lengths[row])]
            if found != noted[1:]:
                raise RuntimeError(
                    f"engine: said that response {row} had ended as {noted.completion!r}, and "
                    f"returned {rollout.completions[row]!r}; ended() takes whole responses"
                )

    def cancel(self) -> None:
        """Cancel all requests that have no answer yet."""
        for call in self.calls.values():
            call.cancel()

    def _batch(self, rows: range) -> tuple[list[str], list[str], dict[str, Any]]:
        """Return prompts, completions and columns of some rows."""
        ended = [self._ended[i] for i in rows]
        prompts, completions = [e.prompt for e in ended], [e.completion for e in ended]
        columns: dict[str, Any] = {k: [c[i] for i in rows] for k, c in self._columns.items()}
        examples = [self._examples[i] for i in rows]
        columns["messages"] = messages_of(examples, prompts, completions)
        columns["completion_ids"] = [e.ids for e in ended]
        return prompts, completions, columns


class EarlyCall:
    """A call of a reward, some of whose requests are sent before all responses have ended.

    It is called once, as the reward is, and gives what the reward would give. Requests that cannot
    be made early are left to that call, which raises the error.

    Args:
        reward: the reward; its ``responses_per_request`` is a number.
        count: number of responses.
    """

    def __init__(self, reward: ByRequests, count: int) -> None:
        self.reward, self.name = reward, name_of(reward)
        self.needs: Sequence[str] = getattr(reward, "needs", ())
        self.__signature__ = inspect.signature(reward)
        self._parts = parts_of(reward, count)
        self._left = [len(rows) for rows in self._parts]  # responses that have not ended
        self._sent: list[range] = []
        self._asking: Asking | None = Asking(reward)

    def complete(self, row: int) -> range | None:
        """Return the rows of a request, if the last of them to end is ``row``."""
        part = row // len(self._parts[0])
        self._left[part] -= 1
        return None if self._left[part] else self._parts[part]

    def send(
        self,
        rows: range,
        prompts: list[str],
        completions: list[str],
        columns: Mapping[str, Any],
    ) -> None:
        """Send the request for some rows."""
        if self._asking is None:
            return
        try:
            named = given_to(self.reward, prompts, completions, columns)[1]
            texts = named.pop("prompts"), named.pop("completions")
            request = self.reward.request_for(*texts, self.reward.taken(named))
        except Exception:  # a column may hold anything
            self._asking.cancel()
            self._asking = None
            return
        self._asking.send(request)
        self._sent.append(rows)

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> Any:
        """Return the scores, as the reward does."""
        if self._asking is None:
            return ask(self.reward, prompts, completions, columns)
        try:  # an interrupt may come anywhere in it
            taken = self.reward.taken(columns)
            rest = [rows for rows in self._parts if rows not in self._sent]
            texts = prompts, completions
            self._asking.send(*(request_for_rows(self.reward, r, *texts, taken) for r in rest))
            self._sent += rest
            answers = dict(zip(self._sent, self._asking.answers(), strict=True))
            return self.reward.joined([answers[rows] for rows in self._parts])
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Cancel requests that have no answer yet."""
        if self._asking is not None:
            self._asking.cancel()
