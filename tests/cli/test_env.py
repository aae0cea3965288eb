"""``ppo-fast env``."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sysconfig

import pytest
import torch
from command_line import flat

from ppo_fast.cli.main import main
from ppo_fast.diagnostics import env
from ppo_fast.ops.backends.impls import COMPILED


def test_env_lists_every_op_and_why(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["env"])
    out = capsys.readouterr().out
    assert torch.__version__ in out
    rows = {}
    for line in out.splitlines():
        cells = [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        if len(cells) == 3:
            rows[cells[0]] = cells[1:]
    assert set(COMPILED) <= set(rows)
    for op in COMPILED:
        implementation, why = rows[op]
        assert implementation in ("reference", "cpp", "triton")
        assert why


def test_env_says_which_fast_paths_a_policy_can_take(place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["env", "--policy", "model"])
    out = flat(capsys.readouterr().out)
    for path in ("fused LM head", "1 of 1 layers fused", "products of few rows"):
        assert f"{path} yes" in out
    assert "frozen trunk no num_layers_unfrozen: got 1" in out, "its one layer is all that there is"


@pytest.fixture
def not_built(monkeypatch):
    """An installation without the extension."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n.endswith("_C") else find_spec(n)
    )
    monkeypatch.setattr(env, "missing", lambda impl: "not there" if impl == "cpp" else None)


REINSTALL = "`pip install --force-reinstall --no-deps --no-cache-dir ppo_fast`"


def test_without_a_compiler_env_says_what_to_install(not_built, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = env.facts(torch.device("cpu"))["C++ kernels"]
    assert "a C++ compiler (Debian: g++; macOS: xcode-select --install) missing here" in found
    assert REINSTALL in found
    assert "the ops run in plain PyTorch" in found


def test_without_headers_of_python_env_says_what_to_install(not_built, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    found = env.facts(torch.device("cpu"))["C++ kernels"]
    assert "Python's headers (Debian: python3-dev) missing here" in found
    assert "a C++ compiler" not in found


def test_with_a_compiler_that_came_later_env_says_to_install_again(
    not_built, monkeypatch, tmp_path
):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(shutil, "which", lambda name: "/opt/cc" if name == "my-cc" else None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setitem(os.environ, "CXX", "my-cc")
    found = env.facts(torch.device("cpu"))["C++ kernels"]
    assert f"what builds them is here now; {REINSTALL}" in found


def test_env_shows_the_threads_of_torch_and_of_the_kernels(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(env, "usable_cpus", lambda: 3)
    assert env.facts(torch.device("cpu"))["threads"] == "8 of torch, 3 of the C++ kernels"
    monkeypatch.setattr(torch.backends.openmp, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert env.facts(torch.device("cpu"))["threads"] == (
        "1 of torch, 1 of the C++ kernels; this torch is built without OpenMP, and may compute "
        "with one thread"
    )
