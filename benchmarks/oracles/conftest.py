"""Print the table of comparisons at the end."""

from __future__ import annotations

from importlib.metadata import version

from oracles.ledger import LINES, table


def pytest_terminal_summary(terminalreporter):
    if not LINES:
        return
    packages = ("verl", "openrlhf", "trl", "torch", "ppo_fast")
    terminalreporter.section("comparisons with other trainers")
    terminalreporter.line(", ".join(f"{name} {version(name)}" for name in packages))
    terminalreporter.line("")
    for text in table():
        terminalreporter.line(text)
