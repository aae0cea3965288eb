"""Examples: prompts with the other columns of their rows, from lists and streams."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ppo_fast.checks import is_whole

# A message of a chat: its "role" and its "content".
Message = dict[str, Any]

# A text, its token ids, or a chat, which the tokenizer's chat template makes a text of.
Prompt = str | list[int] | list[Message]

# Columns that hold a prompt, where none is named.
PROMPT_COLUMNS = ("prompt", "messages")


@dataclass(frozen=True)
class Example:
    """A prompt and the other columns of its row of data.

    prompt: a text, a list of token ids, or a chat: a list of messages.
    columns: what rewards, environments and samples get beside it, by name.
    """

    prompt: Prompt
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def messages(self) -> list[Message]:
        """The prompt as a chat: a text is one message of the user; ids have none."""
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return [m for m in self.prompt if isinstance(m, dict)]


def as_examples(prompts: Any) -> list[Example]:
    """Check prompts, and return them as examples.

    Args:
        prompts: a list (or any iterable with an end) of texts, lists of token ids, chats, rows or
            Examples. A row is a mapping with the prompt in "prompt", or else a chat in "messages".

    Raises:
        TypeError: ``prompts`` is one string or no list, has no end, or holds something else.
        ValueError: there are none, or a row or chat is not complete.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts: got one string, expected a list of strings; pass [prompt]")
    if isinstance(prompts, Stream):
        raise TypeError("prompts: got a stream, which train() reads; take a list of its rows")
    if type(prompts).__name__ == "DataFrame":  # of pandas: it iterates over the columns' names
        prompts = prompts.to_dict("records")
    if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping):
        splits = isinstance(prompts, Mapping) and type(prompts).__name__.endswith("DatasetDict")
        hint = f"; pass one of its splits: {', '.join(map(str, prompts))}" if splits else ""
        raise TypeError(f"prompts: got {type(prompts).__name__}, expected a list of strings{hint}")
    if isinstance(prompts, (itertools.cycle, itertools.count, itertools.repeat)):
        raise TypeError(
            f"prompts: got itertools.{type(prompts).__name__}, which has no end; pass the list "
            "itself, from which train() draws again and again"
        )
    prompts = list(prompts)
    if prompts and all(isinstance(m, Mapping) and m.keys() >= {"role", "content"} for m in prompts):
        raise TypeError("prompts: got one chat, expected a list of them; pass [chat]")
    examples = [as_example(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    if not examples:
        raise ValueError("prompts: got an empty list, expected at least one prompt")
    return examples


def as_example(given: Any, what: str, column: str | None = None) -> Example:
    """Return a prompt or a row as an Example.

    Args:
        given: a text, ids, a chat, a row or an Example.
        what: the prompt's name in errors.
        column: name of a row's column with the prompt; None: "prompt" or else "messages".
    """
    if isinstance(given, Example):
        checked = as_example(given.prompt, what)
        return given if checked.prompt is given.prompt else Example(checked.prompt, given.columns)
    if isinstance(given, Mapping):
        return _example_of_row(given, what, column)
    prompt = _plain(given)
    if isinstance(prompt, str):
        check_text(prompt, what)
        return Example(prompt)
    if _is_ids(prompt):
        return Example(prompt)
    if isinstance(prompt, list) and prompt and all(isinstance(m, Mapping) for m in prompt):
        return Example(_chat(prompt, what))
    raise TypeError(
        f"{what}: got {type(given).__name__}, expected a string, a list of ids, a chat (a list of "
        'messages) or a row with a "prompt"'
    )


def key_of(prompt: Prompt) -> Hashable:
    """Return what tells a prompt from others, and can be a dict's key: a text is its own."""
    if isinstance(prompt, str):
        return prompt
    return json.dumps(prompt, sort_keys=True, default=str)


def _example_of_row(row: Mapping[str, Any], what: str, column: str | None) -> Example:
    for name in row:
        if not isinstance(name, str):
            raise TypeError(f"{what}: has a column named {name!r}, expected a text")
    found = column or next((name for name in PROMPT_COLUMNS if name in row), None)
    if found is None or row.get(found) is None:
        raise ValueError(
            f'{what} has no "{found or "prompt"}"; it has the columns {", ".join(map(str, row))}'
        )
    if isinstance(row[found], Mapping):
        raise TypeError(f'{what}: its "{found}" is a mapping, expected a text, ids or messages')
    example = as_example(row[found], f'{what}: its "{found}"')
    if found == "messages" and not example.messages:
        raise ValueError(f'{what}: its "messages" hold no message')
    if found == "messages" and example.messages[-1]["role"] == "assistant":
        raise ValueError(
            f'{what}: its "messages" end with one of the assistant, which is what the policy has '
            'to write; give the messages before it (row["messages"][:-1]) in a column "prompt"'
        )
    return Example(example.prompt, {name: row[name] for name in row if name != found})


def _chat(messages: Sequence[Mapping[str, Any]], what: str) -> list[Message]:
    for i, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise ValueError(f'{what}[{i}]: a message needs a "role", got {dict(message)!r:.80}')
        content = message.get("content")
        if not isinstance(content, str) and not message.get("tool_calls"):
            raise ValueError(
                f'{what}[{i}]: its "content" is a {type(content).__name__}, expected a text'
            )
        check_text(content or "", f"{what}[{i}]")
    return [dict(message) for message in messages]


def check_text(text: str, what: str) -> None:
    """Raise ValueError if a text holds half of a character, which tokenizers do not take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what}: holds {text[error.start]!r} at {error.start}, half of a pair of UTF-16 that "
            "is no character by itself; repair the text"
        ) from error


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(type(token) is int for token in prompt)


def _plain(prompt: Any) -> Any:
    """Return ids in a tensor, an array or a tuple as a list; anything else as it is."""
    if hasattr(prompt, "tolist") and not isinstance(prompt, str):
        return prompt.tolist()
    if isinstance(prompt, (list, tuple)):
        return [int(token) if is_whole(token) else token for token in prompt]
    return prompt


def is_stream(prompts: Any) -> bool:
    """Return whether ``prompts`` can be read again and again, but has no length."""
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable):
        return False
    return not hasattr(prompts, "__len__") and not isinstance(prompts, Iterator)


class Stream:
    """Examples of a streamed data set, in its own order, read from its start again when it ends.

    Args:
        rows: an iterable that can be read again and again, such as a datasets.IterableDataset.
        column: name of the column with the prompt; see ``as_example``.
        fit: takes some examples and returns those that can be used.

    Attributes:
        dropped: numbers of the rows that were read and did not fit.
    """

    def __init__(
        self,
        rows: Iterable[Any],
        column: str | None = None,
        fit: Callable[[list[Example]], list[Example]] | None = None,
    ) -> None:
        self.rows, self.column, self.fit = rows, column, fit
        self.dropped: set[int] = set()
        self._iterator: Iterator[Any] = iter(())
        self._position: int | None = None
        self._row = -1  # of the current pass

    def take(self, start: int, count: int) -> tuple[list[Example], int]:
        """Return ``count`` examples from row ``start`` on, and the number of rows that they took.

        Rows that do not fit are passed over.

        Raises:
            ValueError: the stream is empty, or no row of it fits.
        """
        if self._position != start:
            self._iterator, self._position, self._row = iter(self.rows), 0, -1
            for _ in range(start):
                self._next()
        found: list[Example] = []
        read = misses = 0
        while len(found) < count:
            row, ended = self._next()
            read += 1
            example = as_example(row, f"prompts: row {start + read - 1}", self.column)
            fitting = [example] if self.fit is None else self.fit([example])
            if not fitting:
                self.dropped.add(self._row)
            misses = 0 if fitting else misses + ended
            if misses > 1:  # a whole pass
                raise ValueError("prompts: no row of the stream fits")
            found += fitting
        return found, read

    def _next(self) -> tuple[Any, bool]:
        """Return the next row, and whether it is the first of a new pass."""
        assert self._position is not None
        self._position += 1
        self._row += 1
        missing = object()
        row = next(self._iterator, missing)
        if row is not missing:
            return row, False
        self._iterator, self._row = iter(self.rows), 0
        row = next(self._iterator, missing)
        if row is missing:
            raise ValueError("prompts: the stream is empty, expected at least one row")
        return row, True
