"""Find and read the number that a text gives as its answer. No text is ever evaluated."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

BOXED_CHARACTERS = 1000
"""Max characters of a \\boxed{...} that are read."""

# An integer part with or without thousands separators, a fraction part, an exponent. No part of it
# can match the same characters in two ways, so that the time grows with the text's length alone.
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+"
_PLAIN = rf"(?:{_DIGITS})(?:[eE][-+\u2212]?[0-9]+)?"
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])[-+\u2212])?"  # not that of a difference or a range: 5-3
    r"\$?(?<![A-Za-z_0-9])"  # a number inside of a word is none: H2O
    rf"(?:\\[dt]?frac ?\{{ ?(?P<top>[-+\u2212]?{_PLAIN}) ?\}} ?\{{ ?(?P<bottom>{_PLAIN}) ?\}}"
    rf"|(?P<number>{_PLAIN})(?: ?/ ?(?P<divisor>{_PLAIN}))?)"
    r"(?P<percent> ?\\?%)?"
)


class Found(NamedTuple):
    """A number in a text, and whether a percent sign follows it."""

    value: float
    percent: bool


def answer_number(text: str) -> Found | None:
    r"""Return the number that ``text`` gives as its answer; None where it has none.

    It is the last one of the last ``\boxed{...}`` or of the last line that begins with ``####``
    (GSM8K's form), whichever comes later, or of the whole text where it has neither. Understood are
    1,234.5, -3, 2e5, 3/4, \frac{3}{4}, 50% and $20. Numbers beyond float64's range are none.
    """
    boxed, marked = text.rfind("\\boxed{"), text.rfind("####")
    if boxed > marked:
        return last_number(_braced(text, boxed + len("\\boxed{")))
    if marked >= 0:
        return last_number(text[marked:].partition("\n")[0])
    return last_number(text)


def last_number(text: str) -> Found | None:
    """Return the last number in ``text``; None where it has none."""
    # LaTeX's ways to write 1,234
    text = text.replace("{,}", ",").replace("\\,", "").replace("\\!", "")
    found = None
    for match in _NUMBER.finditer(text):
        found = match
    return _read(found) if found else None


def _read(match: re.Match[str]) -> Found | None:
    top, bottom = match["top"] or match["number"], match["bottom"] or match["divisor"] or "1"
    divisor = _float(bottom)
    if divisor == 0 or not math.isfinite(divisor):
        return None
    value = _float(top) / divisor
    if match["sign"] in ("-", "\u2212"):
        value = -value
    return Found(value, match["percent"] is not None) if math.isfinite(value) else None


def _float(digits: str) -> float:
    return float(digits.replace(",", "").replace("\u2212", "-"))


def _braced(text: str, start: int) -> str:
    """Return the text from ``start`` to the brace that closes it."""
    depth = 1
    end = min(len(text), start + BOXED_CHARACTERS)
    for i in range(start, end):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i]
    return text[start:end]
