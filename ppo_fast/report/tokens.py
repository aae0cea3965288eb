"""Responses with a colour and numbers for each token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ppo_fast.report.axes import number
from ppo_fast.report.html import Html, cut, element, joined
from ppo_fast.report.lines import Record, as_number

# Numbers of a token, by their names in the files; the letter of their classes; in words.
QUANTITIES = {
    "log_ratio": ("l", "log ratio to the reference"),
    "advantage": ("a", "advantage"),
    "value": ("v", "value"),
}
LEVELS = 5  # of colour on each side of the middle
MOST_TOKENS, LONGEST_TOKEN = 400, 80


class Scale(NamedTuple):
    """Numbers at the middle of the colours, and from there to the strongest one."""

    middle: float
    reach: float

    def level(self, value: float) -> int:
        """Return the colour of a value, -LEVELS to LEVELS."""
        level = round(LEVELS * (value - self.middle) / self.reach)
        return min(max(level, -LEVELS), LEVELS)


def tokens_of(sample: Record) -> dict[str, list[Any]] | None:
    """Return the lists of a sample's tokens that have the length of its texts; None without any."""
    found = sample.get("tokens")
    if not isinstance(found, dict):
        return None
    texts = found.get("text")
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        return None
    kept: dict[str, list[Any]] = {"text": texts[:MOST_TOKENS]}
    for name in QUANTITIES:
        values = found.get(name)
        if isinstance(values, list) and len(values) == len(texts):
            kept[name] = [as_number(value) for value in values[:MOST_TOKENS]]
    return kept


def scales(samples: Iterable[Record]) -> dict[str, Scale]:
    """Return the scale of each quantity that the samples have.

    The middle of values is their mean, that of others 0. Within reach are 98 of 100.
    """
    found = {}
    every = [tokens for sample in samples if (tokens := tokens_of(sample)) is not None]
    for name in QUANTITIES:
        values = [v for tokens in every for v in tokens.get(name, ()) if v is not None]
        if values:
            middle = sum(values) / len(values) if name == "value" else 0.0
            distances = sorted(abs(value - middle) for value in values)
            found[name] = Scale(middle, distances[len(distances) * 98 // 100] or 1.0)
    return found


def coloured(tokens: dict[str, list[Any]], by_name: dict[str, Scale], whole: int) -> Html:
    """Return the text of tokens, each with its colours and its numbers.

    Args:
        whole: number of tokens of the response, of which ``tokens`` may have the first alone.
    """
    spans = []
    for i, text in enumerate(tokens["text"]):
        numbers = {name: tokens[name][i] for name in by_name if name in tokens}
        known = {name: value for name, value in numbers.items() if value is not None}
        levels = [f"{QUANTITIES[n][0]}{by_name[n].level(v)}" for n, v in known.items()]
        words = ", ".join(f"{QUANTITIES[name][1]} {number(value)}" for name, value in known.items())
        shown = cut(text, LONGEST_TOKEN).replace("\n", "↵\n")
        spans.append(
            element("span", shown, class_=" ".join(["t", *levels]), tabindex="0", data_n=words)
        )
    left = whole - len(tokens["text"])
    more = element("span", f" … ({left:,} tokens more)", class_="hint") if left > 0 else None
    return element("p", joined(*spans), more, class_="text tokens", dir="auto")


def legend(by_name: dict[str, Scale]) -> list[Html]:
    """Return, for each quantity, a switch and the colours' scale; CSS shows the chosen one's."""
    switches: list[Html] = []
    keys: list[Html] = []
    for name in by_name:
        switches += _switch(name, QUANTITIES[name][1], checked=not switches)
        keys.append(_key(name, by_name[name]))
    return [*switches, *_switch("none", "no colours", checked=False), *keys]


def _switch(name: str, words: str, *, checked: bool) -> Sequence[Html]:
    return (
        element("input", type="radio", name="colours", id=f"by-{name}", checked=checked),
        element("label", words, for_=f"by-{name}"),
    )


def _key(name: str, scale: Scale) -> Html:
    letter = QUANTITIES[name][0]
    swatches = [element("i", class_=f"t {letter}{level}") for level in range(-LEVELS, LEVELS + 1)]
    low, high = scale.middle - scale.reach, scale.middle + scale.reach
    return element(
        "p",
        element("span", f"≤ {number(low)}"),
        element("span", *swatches, class_="swatches", aria_hidden="true"),
        element("span", f"≥ {number(high)}"),
        element("span", f"(middle {number(scale.middle)})", class_="hint"),
        class_=f"scale for-{name}",
    )
