"""Axes of a chart: from numbers to places, ticks, and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Axis(NamedTuple):
    """An axis: ``low`` is drawn at ``start``, ``high`` at ``end``."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Return the place of a value, in units of the picture, to a tenth."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round numbers from ``low`` to ``high``."""
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * times for times in (1, 2, 2.5, 5, 10) if size * times >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def widened(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    """Return a range with some room on both sides, and of more than no width."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(high) * 0.5 or 1.0
        return low - room, high + room
    room = (high - low) * share
    return low - room, high + room


def inner_range(values: Sequence[float]) -> tuple[float, float]:
    """Return the range that a picture shows: of all values, unless few lie far outside of the rest.

    Then it is the range of the middle 96 of 100, three times as wide.
    """
    low, high = min(values), max(values)
    ordered = sorted(values)
    bottom, top = ordered[len(ordered) // 50], ordered[-1 - len(ordered) // 50]
    width = top - bottom
    if len(values) >= 50 and width > 0 and high - low > 6 * width:
        return max(low, bottom - width), min(high, top + width)
    return low, high


def number(value: float) -> str:
    """Return a number with four digits that count."""
    if value == 0:
        return "0"
    if 1e4 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def short(value: float) -> str:
    """Return a number with three digits that count."""
    return f"{value:.3g}" if abs(value) < 1e3 else number(value)


def tick_labels(values: Sequence[float]) -> list[str]:
    """Return short texts for ticks, with as many digits as tell them apart."""
    largest = max((abs(value) for value in values), default=0.0)
    unit, end = (1e3, "k") if 1e4 <= largest < 1e6 else (1.0, "")
    scaled = [0.0 if abs(value) < 1e-9 * largest else value / unit for value in values]
    for digits in range(4 if unit == 1.0 and largest >= 1e3 else 3, 17):
        texts = [f"{value:.{digits}g}" for value in scaled]
        if len({*texts}) == len(texts):
            break
    return [text if text == "0" else text + end for text in texts]
