"""The package's imports: none runs up to a higher floor, and none runs in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ppo_fast"
FLOORS = (
    {"checks"},
    {"ops", "data"},
    {"config"},
    {"models"},
    {"rollout", "rewards", "critics"},
    {"learning", "runs", "diagnostics"},
    {"ppo"},
    {"trainer"},
    {"demo", "cli"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules():
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
    }


def path_of(module):
    path = PACKAGE.parent / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(module, *, at_import=False):
    """The modules of this package that a module imports; ``at_import``: when it is loaded."""
    tree = ast.parse(path_of(module).read_text("utf-8"))
    nodes = tree.body if at_import else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ppo_fast"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in modules() else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("ppo_fast")}
    return found - {"ppo_fast"}


def room(module):
    return module.split(".")[1]


INSIDE = sorted(modules() - {"ppo_fast"})


def test_every_room_has_a_floor():
    assert {room(module) for module in INSIDE} == FLOOR.keys()


@pytest.mark.parametrize("module", INSIDE)
def test_no_import_runs_up(module):
    for other in imports(module):
        assert FLOOR[room(other)] <= FLOOR[room(module)], f"{module} imports {other}"


def test_no_circle_between_rooms():
    edges = {}
    for module in INSIDE:
        others = {room(other) for other in imports(module)} - {room(module)}
        edges.setdefault(room(module), set()).update(others)
    assert circle(edges) is None


def test_no_circle_between_modules():
    edges = {module: imports(module, at_import=True) - {module} for module in INSIDE}
    assert circle(edges) is None


def circle(edges):
    """A circle in a graph, or None."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return None
        path.append(node)
        for other in sorted(edges.get(node, ())):
            if found := visit(other):
                return found
        path.pop()
        done.add(node)
        return None

    return next((found for node in sorted(edges) if (found := visit(node))), None)


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def loaded(statement):
    """The modules that a fresh process has loaded after ``statement``."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_operations_stand_alone():
    found = loaded("from ppo_fast.ops import gae, ppo_loss, linear_logprobs, sample_tokens")
    assert "torch" in found
    assert not found & {"transformers", "rich", "tyro", "torch._dynamo"}
    inside = {name for name in found if name.startswith("ppo_fast.")}
    assert {room(name) for name in inside} == {"ops"}


def test_settings_need_no_torch():
    found = loaded("from ppo_fast import PPOConfig; PPOConfig()")
    assert not found & {"torch", "transformers", "numpy"}


def test_the_command_line_needs_no_torch_for_its_help():
    found = loaded("from ppo_fast.cli.main import main")
    assert not found & {"torch", "transformers"}


def test_the_packages_face():
    import ppo_fast

    assert set(ppo_fast.__all__) <= set(dir(ppo_fast))
    for name in ppo_fast.__all__:
        assert getattr(ppo_fast, name).__name__ == name
    with pytest.raises(AttributeError, match="'ppo_fast' has no attribute 'PPOTrainr'"):
        _ = ppo_fast.PPOTrainr
