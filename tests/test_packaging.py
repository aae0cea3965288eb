"""The package outside its checkout: as a wheel, and without the compiled extension."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ppo_fast"


def run_python(code, package_parent, tmp_path):
    """Run code in a fresh process, in an empty folder, with package_parent first on the path.

    -S leaves out the site module and with it the editable install's finder, which would come
    before the path.
    """
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    header = f"import sys; sys.path[:] = {[str(package_parent), *sys.path]!r}\n"
    done = subprocess.run(
        [sys.executable, "-S", "-c", header + code],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def build(folder, *options, env=None):
    """Build the wheel in ``folder``; return its path, and what pip and CMake said."""
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    command = [*pip, *options, "-w", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # In the build folder of `make install`, whose objects it finds.
    return build(tmp_path_factory.mktemp("wheel"))[0]


def without_compilers():
    """An environment that has CMake and ninja, and no compiler."""
    tools = str(Path(sys.executable).parent)
    assert not any(shutil.which(name, path=tools) for name in ("c++", "g++", "clang++", "cc"))
    kept = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    return kept | {"PATH": tools}


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    in_package = {name for name in names if name.startswith("ppo_fast/")}
    extensions = {name for name in in_package if name.endswith((".so", ".pyd"))}
    assert len(extensions) == 1
    assert next(iter(extensions)).startswith("ppo_fast/ops/_C.")
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so", ".pyd")
    }
    assert in_package - extensions == sources
    data = {"ppo_fast/demo/reviews.txt", "ppo_fast/rewards/principles.yaml"}
    assert data | {"ppo_fast/py.typed", "ppo_fast/ops/_C.pyi"} <= sources
    others = names - in_package
    assert all(".dist-info/" in name for name in others), f"csrc or tests? {others}"
    assert any(name.endswith("licenses/LICENSE") for name in others)


def test_wheel_runs_outside_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = """
import torch
import ppo_fast
from ppo_fast.ops.gae import gae
ones = torch.ones(64, 512)
advantages = gae(ones, ones, gamma=0.5, lam=0.0, impl="cpp").advantages
assert advantages[0].tolist() == [0.5] * 511 + [0.0]
print(ppo_fast.__file__)
"""
    (file,) = run_python(code, tmp_path / "installed", tmp_path)
    assert Path(file) == tmp_path / "installed" / "ppo_fast" / "__init__.py"


def test_a_new_isolated_environment_compiles_nothing_again(wheel, tmp_path):
    """As `pip install ".[demo]"` after `pip install .`: each has an environment of its own."""
    found = {path: json.loads(path.read_text()) for path in ROOT.glob("build/*/.skbuild-info.json")}
    ours = [path for path, facts in found.items() if facts["python_executable"] == sys.executable]
    (info,) = (path for path in ours if path.parent.name.startswith("cp"))
    objects = {path: path.stat().st_mtime_ns for path in (info.parent / "bindings").rglob("*.o")}
    assert len(objects) > 10
    commands = (info.parent / "build.ninja").read_text()
    assert "site-packages" not in " ".join(re.findall(r"INCLUDES = .*", commands))
    info.write_text(json.dumps(found[info] | {"skbuild_path": "/tmp/pip-build-env-1"}))
    build(tmp_path)
    assert json.loads(info.read_text())["skbuild_path"] == found[info]["skbuild_path"]
    assert {path: path.stat().st_mtime_ns for path in objects} == objects


@pytest.mark.parametrize("compiler", [None, "/not/there/c++"])
def test_without_a_compiler_it_installs_without_the_extension(tmp_path, compiler):
    env = without_compilers() | ({} if compiler is None else {"CXX": compiler, "CC": compiler})
    options = ["-v", f"--config-settings=build-dir={tmp_path / 'build'}"]
    wheel, said = build(tmp_path, *options, env=env)
    (line,) = (line.strip() for line in said.splitlines() if "without the C++ kernels" in line)
    assert line == (
        "ppo_fast: installing without the C++ kernels: no C++ compiler works here; install g++ or "
        "clang++, and install ppo_fast again"
    )
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".pyd"))]
        archive.extractall(tmp_path / "installed")
    code = """
import torch
import ppo_fast
from ppo_fast.diagnostics.env import facts
from ppo_fast.ops.gae import gae
ones = torch.ones(2, 3)
assert gae(ones, ones, gamma=0.5, lam=0.0).returns.tolist() == [[1.5, 1.5, 1.0]] * 2
found = facts(torch.device("cpu"))["C++ kernels"]
assert found.startswith("not built when ppo_fast was installed: "), found
print(ppo_fast.__file__)
"""
    (file,) = run_python(code, tmp_path / "installed", tmp_path)
    assert Path(file).is_relative_to(tmp_path)


def test_a_compiler_that_comes_later_is_found(tmp_path):
    """In the same build folder."""
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or "cmake"
    python = f"-DPython_EXECUTABLE={sys.executable}"
    pybind11 = [sys.executable, "-m", "pybind11", "--cmakedir"]
    folder = subprocess.run(pybind11, capture_output=True, text=True, check=True).stdout.strip()
    command = [cmake, "-S", str(ROOT / "csrc"), "-B", str(tmp_path), "-G", "Ninja", python]
    command.append(f"-Dpybind11_DIR={folder}")
    tools = without_compilers()
    subprocess.run(command, check=True, env=tools, capture_output=True)
    assert "_C." not in (tmp_path / "build.ninja").read_text()
    tools |= {"PATH": os.pathsep.join([tools["PATH"], os.environ["PATH"]])}
    subprocess.run(command, check=True, env=tools, capture_output=True)
    assert "_C." in (tmp_path / "build.ninja").read_text()


def test_without_the_extension(tmp_path):
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "copy" / "ppo_fast", ignore=ignored)
    code = """
import torch
import ppo_fast
from ppo_fast.ops.backends.impls import missing
from ppo_fast.ops.gae import gae
reason = missing("cpp")
assert "ppo_fast.ops._C is not there" in reason, reason
ones = torch.ones(2, 3)
try:
    gae(ones, ones, gamma=0.5, lam=0.0, impl="cpp")
except RuntimeError as error:
    assert reason in str(error), error
else:
    raise AssertionError("impl='cpp' ran without the extension")
for impl in ("auto", "reference"):
    assert gae(ones, ones, gamma=0.5, lam=0.0, impl=impl).returns.tolist() == [[1.5, 1.5, 1.0]] * 2
print(ppo_fast.__file__)
"""
    (file,) = run_python(code, tmp_path / "copy", tmp_path)
    assert Path(file).is_relative_to(tmp_path)
