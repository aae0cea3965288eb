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
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(self.cls)))
        except (OSError, TypeError):  # installed without sources
            return self.summary
        defaults = {item.name: item.default for item in fields(self.cls)}
        entries = []
        for item, after in pairwise(tree.body[0].body):  # type: ignore[attr-defined]
            if isinstance(item, ast.AnnAssign):
                name, kind = ast.unparse(item.target), ast.unparse(item.annotation)
                words = " ".join(ast.literal_eval(after.value).split())
                entries.append(f"{name} ({kind}, default {defaults[name]!r}): {words}")
        wrapped = textwrap.TextWrapper(
            96, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False
        )
        return "\n".join([self.summary, "", "Args:", *map(wrapped.fill, entries)])
