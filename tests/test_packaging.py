"""The package outside its checkout: as a wheel, and without the compiled extension."""

from __future__ import annotations

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
    ]
    # In the build folder of `make install`, whose objects it finds.
    done = subprocess.run(
        [*build, "-w", str(folder), str(ROOT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


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
    assert {"ppo_fast/py.typed", "ppo_fast/ops/_C.pyi", "ppo_fast/demo/reviews.txt"} <= sources
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
