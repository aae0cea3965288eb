"""The package's folders, their layers and imports; run as a script, this module updates the diagram
in docs/architecture.md."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ppo_fast"
DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- drawn by tests/helpers/imports.py -->\n", "<!-- end -->\n"

LAYERS = (
    ("checks", "disk", "nonfinite", "user_code", "hub"),
    ("ops", "data"),
    ("config",),
    ("models",),
    ("rollout", "rewards", "critics"),
    ("learning", "checkpointing", "runs", "diagnostics"),
    ("exports", "run_folder", "trackers", "report"),
    ("parts", "running"),
    ("ppo",),
    ("classic_methods",),
    ("trainer",),
    ("demo", "cli", "classic"),
)
LAYER = {folder: number for number, folders in enumerate(LAYERS) for folder in folders}


def _modules() -> set[str]:
    paths = (path.relative_to(ROOT).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return {".".join(path.parts).removesuffix(".__init__") for path in paths}


EVERY = _modules()
INSIDE = sorted(EVERY - {"ppo_fast"})


def imports(module: str, *, at_import: bool = False) -> set[str]:
    """Return the package's modules that a module imports; ``at_import``: only when it is loaded."""
    path = ROOT / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text("utf-8"))
    found = set()
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ppo_fast"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in EVERY else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("ppo_fast")}
    return found - {"ppo_fast", module}  # type: ignore[return-value]


def folder(module: str) -> str:
    return module.split(".")[1]


def folders() -> dict[str, set[str]]:
    """Return the folders that each folder imports."""
    edges: dict[str, set[str]] = {name: set() for name in LAYER}
    for module in INSIDE:
        edges[folder(module)] |= {folder(other) for other in imports(module)} - {folder(module)}
    return edges


def diagram() -> str:
    """Return a diagram in which an arrow means "imports"; implied arrows are left out."""
    edges = folders()

    def reached(start: str) -> set[str]:
        return set().union(*({other} | reached(other) for other in edges[start]))

    lines = ["```mermaid", "flowchart TD"]
    for names in reversed(LAYERS):
        lines.append("  " + " & ".join(names) if len(names) == 1 else "  " + "; ".join(names))
    for name in reversed(LAYER):
        implied = set().union(*(reached(other) for other in edges[name]))
        lines += [f"  {name} --> {other}" for other in sorted(edges[name] - implied)]
    return "\n".join([*lines, "```", ""])


def main() -> None:
    before, _, rest = DOCUMENT.read_text("utf-8").partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + diagram() + END + rest.partition(END)[2], "utf-8")


if __name__ == "__main__":
    main()
