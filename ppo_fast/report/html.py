"""Elements of HTML and SVG, in which every text and every value of an attribute is escaped.

A page is made by ``element`` alone: a str becomes text, and only an ``Html`` stays markup.
"""

from __future__ import annotations

import html
import json
from typing import Any

from ppo_fast.runs.plain_text import visible

# Stands where a value is missing.
MISSING = "\N{EN DASH}"
# Elements of HTML without content and end tag.
VOID = frozenset({"br", "col", "hr", "input", "meta"})


class Html(str):
    """Markup, made by ``element``, ``joined`` or from this package's own files."""

    __slots__ = ()


Child = str | Html | None


def element(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Html:
    """Return an element.

    Args:
        name: of the element, in our own words.
        children: texts, which are escaped, and markup; None: left out.
        attributes: their values, which are escaped. A "_" in a name stands for "-", one at its end
            is dropped (``class_``). None and False: left out; True: without a value.
    """
    found = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID:
        return Html(f"<{name}{found}>")
    return Html(f"<{name}{found}>{joined(*children)}</{name}>")


def joined(*children: Child) -> Html:
    """Return texts, which are escaped, and markup as one piece of markup; None: left out."""
    return Html(
        "".join(c if isinstance(c, Html) else escaped(c) for c in children if c is not None)
    )


def escaped(text: str) -> Html:
    """Return a text as markup that shows it; control characters are shown as escapes."""
    return Html(html.escape(visible(text), quote=True))


def embedded(value: Any) -> Html:
    """Return JSON that can stand within ``<script type="application/json">``."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(text)


def cut(value: object, length: int) -> str:
    """Return ``str(value)``, or its first ``length`` characters and how many more there are."""
    text = value if isinstance(value, str) else str(value)
    if len(text) <= length:
        return text
    return f"{text[:length]} … ({len(text) - length:,} characters more)"


def _attribute(name: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escaped(str(value))}"'
