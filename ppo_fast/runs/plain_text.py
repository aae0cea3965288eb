"""Text of models, users and file names for a console, where none of it is an instruction."""

from __future__ import annotations

import unicodedata

from rich.text import Text

# They change the order in which a terminal shows the characters after them.
_REORDERING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def plain(text: object) -> Text:
    """Return ``str(text)`` as rich's Text: no markup, no emoji codes, and control characters shown.

    rich reads a str as markup: "[/]" in it is an error, "[red]" a colour, "[link=...]" a link.
    """
    return Text(visible(str(text)))


def visible(text: str) -> str:
    r"""Return ``text`` with control characters as escapes (``\x1b``), but for line breaks and tabs.

    A terminal would obey them.
    """
    return "".join(_escaped(c) if _is_control(c) else c for c in text)


def _is_control(character: str) -> bool:
    if character in "\n\t":
        return False
    kind = unicodedata.category(character)
    return kind in ("Cc", "Cs", "Zl", "Zp") or ord(character) in _REORDERING


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
