"""The package's imports: none goes to a higher layer, and there are no import cycles."""

from __future__ import annotations

import subprocess
import sys

import pytest
from imports import BEGIN, DOCUMENT, END, INSIDE, LAYER, diagram, folder, folders, imports


def test_every_folder_has_a_layer():
    assert {folder(module) for module in INSIDE} == LAYER.keys()


@pytest.mark.parametrize("module", INSIDE)
def test_no_import_goes_to_a_higher_layer(module):
    for other in imports(module):
        assert LAYER[folder(other)] <= LAYER[folder(module)], f"{module} imports {other}"


def test_no_import_cycle_between_folders():
    assert cycle(folders()) is None


def test_no_import_cycle_between_modules():
    edges = {module: imports(module, at_import=True) for module in INSIDE}
    assert cycle(edges) is None


def test_the_diagram_shows_the_current_imports():
    """`python tests/helpers/imports.py` updates the diagram."""
    assert BEGIN + diagram() + END in DOCUMENT.read_text("utf-8")


def cycle(edges):
    """Return a cycle of a graph, or None."""
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


def test_cycles_are_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def loaded(statement):
    """Return the modules that a new process has loaded after ``statement``."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_operations_import_only_torch():
    found = loaded("from ppo_fast.ops import gae, ppo_loss, linear_logprobs, sample_tokens")
    assert "torch" in found
    assert not found & {"transformers", "rich", "tyro", "torch._dynamo"}
    inside = {name for name in found if name.startswith("ppo_fast.")}
    assert {folder(name) for name in inside} == {"ops"}


def test_settings_need_no_torch():
    found = loaded("from ppo_fast import PPOConfig; PPOConfig()")
    assert not found & {"torch", "transformers", "numpy"}


def test_the_command_line_needs_no_torch_for_its_help():
    found = loaded("from ppo_fast.cli.main import main")
    assert not found & {"torch", "transformers"}


def test_public_names_are_importable():
    import ppo_fast

    assert set(ppo_fast.__all__) <= set(dir(ppo_fast))
    for name in ppo_fast.__all__:
        assert getattr(ppo_fast, name).__name__ == name
    with pytest.raises(AttributeError, match="'ppo_fast' has no attribute 'PPOTrainr'"):
        _ = ppo_fast.PPOTrainr
