"""Texts of models, users and file names on the console: shown as they are, never obeyed."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table

from ppo_fast.runs.plain_text import plain, visible

OBEYED = ["[/]", "[red]a[/red]", "[link=https://example.org]a[/link]", ":smile:", r"\[b]"]


@pytest.mark.parametrize("text", OBEYED)
def test_markup_is_shown_as_it_is(text):
    console = Console(file=StringIO(), force_terminal=True, color_system="truecolor", width=80)
    console.print(plain(text))
    table = Table("column", title=plain(text))
    table.add_row(plain(text))
    console.print(table)
    shown = console.file.getvalue()
    assert shown.count(text) == 3
    assert "\x1b]8" not in shown, "no link"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("a\rb\x08\x00\x7f", r"a\rb\x08\x00\x7f"),
        ("a\u202eb\u2066c", r"a\u202eb\u2066c"),
        ("a\u2028b\x85", r"a\u2028b\x85"),
        ("\ud800", r"\ud800"),
        ("two\nlines\tand naïve 😀 \u200d", "two\nlines\tand naïve 😀 \u200d"),
    ],
)
def test_control_characters_are_shown(text, expected):
    assert visible(text) == plain(text).plain == expected
