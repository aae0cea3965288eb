"""Rewards by the text of a completion alone, or by comparison with a column of the data.

None of them runs or evaluates what a model wrote: texts are compared, matched and counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from ppo_fast.checks import is_whole
from ppo_fast.rewards.columns import column as column_of
from ppo_fast.rewards.columns import for_prompt, signature_with
from ppo_fast.rewards.numbers import Found, answer_number, last_number

Unit = Literal["tokens", "words", "characters"]


class ExactMatch:
    """1.0 where the completion is the column's text, else 0.0.

    White space around both is stripped. Where the column has None, the response is not judged.

    Args:
        column: name of the column with the right texts, or numbers, whose ``str`` is compared.
        extract: a regular expression whose last match in the completion is compared, by its first
            group if it has one; without a match the score is 0.0. None: the whole completion. A
            pattern that backtracks without bound is slow on some texts.
        ignore_case: compare without regard to case.

    Raises:
        ValueError: ``extract`` is no regular expression.
    """

    name = "exact_match"

    def __init__(
        self, column: str = "answer", *, extract: str | None = None, ignore_case: bool = False
    ) -> None:
        self.column, self.ignore_case = column, ignore_case
        self.needs = (column,)
        self._pattern = None if extract is None else _compiled("extract", extract)
        self.__signature__ = signature_with(self.needs)

    def __call__(
        self, prompts: list[str], completions: list[str], **columns: Any
    ) -> list[float | None]:
        answers = column_of(columns, self.column, "ExactMatch")
        pairs = zip(completions, answers, strict=True)
        return [None if answer is None else self._score(text, answer) for text, answer in pairs]

    def _score(self, completion: str, answer: Any) -> float:
        text = completion if self._pattern is None else _last_match(self._pattern, completion)
        return float(text is not None and self._plain(text) == self._plain(str(answer)))

    def _plain(self, text: str) -> str:
        return text.strip().casefold() if self.ignore_case else text.strip()


class NumericMatch:
    r"""1.0 where the completion's last number is the column's, else 0.0.

    Numbers are read from texts as 1,234.5, -3, 2e5, 3/4, \frac{3}{4}, 50% or $20. If a completion
    has a ``\boxed{...}`` or a line with ``####`` (GSM8K's form), the last number there counts, else
    its last number. A number inside of a word (H2O) is none. 50% equals 50% and 50 and 0.5. Numbers
    are compared as float64; one beyond its range equals nothing.

    Args:
        column: name of the column with the right numbers, or with texts, which are read alike: the
            solutions of GSM8K are understood as they are. Where it has None, the response is not
            judged.
        extract: a regular expression whose last match in the completion, by its first group if it
            has one, is read instead of the completion. See ExactMatch.
        tolerance: largest difference, relative to the column's number; of 0 itself, in absolute
            size.

    Raises:
        ValueError: ``extract`` is no regular expression, or ``tolerance`` is negative.
    """

    name = "numeric_match"

    def __init__(
        self, column: str = "answer", *, extract: str | None = None, tolerance: float = 1e-6
    ) -> None:
        if not tolerance >= 0:
            raise ValueError(f"tolerance: got {tolerance!r}, expected a number >= 0")
        self.column, self.tolerance = column, tolerance
        self.needs = (column,)
        self._pattern = None if extract is None else _compiled("extract", extract)
        self.__signature__ = signature_with(self.needs)

    def __call__(
        self, prompts: list[str], completions: list[str], **columns: Any
    ) -> list[float | None]:
        """Raise ValueError where an entry of the column is no number and has none."""
        answers = column_of(columns, self.column, "NumericMatch")
        rows = zip(prompts, completions, answers, strict=True)
        return [None if row[2] is None else self._score(*row) for row in rows]

    def _score(self, prompt: str, completion: str, answer: Any) -> float:
        truth = _truth(answer)
        if truth is None:
            raise ValueError(
                f"column {self.column!r}: got {answer!r} for {for_prompt(prompt)}, expected a "
                "number or a text with one"
            )
        if self._pattern is None:
            found = answer_number(completion)
        else:
            text = _last_match(self._pattern, completion)
            found = last_number(text) if text is not None else None
        return float(found is not None and self._equal(found, truth))

    def _equal(self, found: Found, truth: Found) -> bool:
        bound = self.tolerance * (abs(truth.value) or 1.0)
        if abs(found.value - truth.value) <= bound:
            return True
        if found.percent and not truth.percent:
            return abs(found.value / 100 - truth.value) <= bound
        return (
            truth.percent
            and not found.percent
            and abs(found.value - truth.value / 100) <= bound / 100
        )


class RegexMatch:
    """1.0 where the completion matches a regular expression, else 0.0.

    A pattern that backtracks without bound, such as ``(a+)+$``, takes a time exponential in the
    length of some texts, and a policy may write one: prefer patterns without nested repetition.

    Args:
        pattern: the regular expression, of Python's ``re``.
        full: whether the whole completion must match, not some part of it.
        flags: of ``re``, such as ``re.IGNORECASE``.

    Raises:
        ValueError: ``pattern`` is no regular expression.
    """

    name = "regex_match"

    def __init__(self, pattern: str, *, full: bool = False, flags: int = 0) -> None:
        compiled = _compiled("pattern", pattern, flags)
        self._match: Callable[[str], Any] = compiled.fullmatch if full else compiled.search

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        return [float(self._match(text) is not None) for text in completions]


class Length:
    """Minus the distance of a completion's length n from a target: -abs(n - target) / scale.

    With the default scale it is 0 at the target and -1 for an empty completion or one that is twice
    as long.

    Args:
        target: the length.
        unit: what is counted: "tokens" of the policy's tokenizer, "words" (between white space) or
            "characters".
        scale: the distance that gives -1; None: the target.

    Raises:
        ValueError: a value is out of range.
    """

    name = "length"

    def __init__(self, target: int, *, unit: Unit = "tokens", scale: float | None = None) -> None:
        if not is_whole(target) or target < 1:
            raise ValueError(f"target: got {target!r}, expected a whole number >= 1")
        if unit not in ("tokens", "words", "characters"):
            raise ValueError(f"unit: got {unit!r}, expected 'tokens', 'words' or 'characters'")
        if scale is not None and not scale > 0:
            raise ValueError(f"scale: got {scale!r}, expected a number above 0, or None")
        self.target, self.unit, self.scale = target, unit, scale or target
        self.__signature__ = signature_with(("completion_ids",) if unit == "tokens" else ())

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[float]:
        if self.unit == "tokens":
            if completion_ids is None:
                raise ValueError("Length: got no completion_ids, by which it counts tokens")
            counts = [len(ids) for ids in completion_ids]
        elif self.unit == "words":
            counts = [len(text.split()) for text in completions]
        else:
            counts = [len(text) for text in completions]
        return [-abs(count - self.target) / self.scale for count in counts]


class Repetition:
    """Minus the share of a completion's n-grams of words that repeat an earlier one, in (-1, 0].

    With u different ones among m, it is -(1 - u / m); without any, 0. Words are lowercased and
    stand between white space. The penalty of repeated n-grams is that of Yeo et al. 2025 (arXiv
    2502.03373, appendix C.2), here as one number a response.

    Args:
        n: number of words in an n-gram.

    Raises:
        ValueError: ``n`` is no whole number of at least 1.
    """

    name = "repetition"

    def __init__(self, n: int = 3) -> None:
        if not is_whole(n) or n < 1:
            raise ValueError(f"n: got {n!r}, expected a whole number >= 1")
        self.n = n

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        return [self._score(text.lower().split()) for text in completions]

    def _score(self, words: list[str]) -> float:
        grams = [tuple(words[i : i + self.n]) for i in range(len(words) - self.n + 1)]
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0


# By these names on the command line: --reward ppo_fast.rewards:exact_match
exact_match = ExactMatch()
numeric_match = NumericMatch()
repetition = Repetition()


def _truth(answer: Any) -> Found | None:
    try:
        return answer_number(answer if isinstance(answer, str) else repr(float(answer)))
    except (TypeError, ValueError, OverflowError):
        return None


def _compiled(argument: str, pattern: str, flags: int = 0) -> re.Pattern[str]:
    try:
        return re.compile(pattern, flags)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{argument}: got {pattern!r}, expected a regular expression ({error})"
        ) from error


def _last_match(pattern: re.Pattern[str], text: str) -> str | None:
    """Return the first group, or all, of the last match; None without one."""
    found = None
    for match in pattern.finditer(text):
        found = match
    if found is None:
        return None
    group = found[1] if pattern.groups else found[0]
    return "" if group is None else group
