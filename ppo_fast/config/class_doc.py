"""Docstrings of dataclasses, made from the strings below their fields."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import fields
from functools import cached_property
from itertools import pairwise


class ClassDoc:
    """Docstring of a dataclass with a line for each field: its type, default and own docstring.

    The fields' docstrings, which are the strings below them, are read from the source when somebody
    asks for the class's.
    """

    def __init__(self, cls: type) -> None:
        self.cls, self.summary = cls, inspect.cleandoc(cls.__doc__ or "")

    def __get__(self, instance: object, owner: type) -> str:
        return self.text

    @cached_property
    def text(self) -> str:
        docs = field_docs(self.cls)
        if not docs:
            return self.summary
        defaults = {item.name: item.default for item in fields(self.cls)}
        entries = [
            f"{name} ({kind}, default {defaults[name]!r}): {words}"
            for name, (kind, words) in docs.items()
        ]
        wrapped = textwrap.TextWrapper(
            96, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False
        )
        return "\n".join([self.summary, "", "Args:", *map(wrapped.fill, entries)])


def field_docs(cls: type) -> dict[str, tuple[str, str]]:
    """Return (type as written, docstring in one line) of each field that has a docstring, by name.

    It is empty where the class was installed without its source.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return {}
    found = {}
    for item, after in pairwise(tree.body[0].body):  # type: ignore[attr-defined]
        if isinstance(item, ast.AnnAssign) and isinstance(after, ast.Expr):
            words = " ".join(ast.literal_eval(after.value).split())
            found[ast.unparse(item.target)] = ast.unparse(item.annotation), words
    return found
