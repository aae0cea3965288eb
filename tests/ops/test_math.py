"""csrc/base/math.hpp and conversions of csrc/base/dtype.hpp, compiled for each instruction set."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from ppo_fast.ops import _C

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
COMPILER = shutil.which("c++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (c++) to test with")

FLAGS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS["avx2"] = ["-mavx2", "-mfma"]
    AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
    FLAGS["avx512"] = [*FLAGS["avx2"], *AVX512]

# Largest errors in ulp, as csrc/base/math.hpp states them; an ulp is that of the correct result.
BOUNDS = {
    "exp2_nonpositive": (1.2, np.exp2),
    "exp_": (1.5, np.exp),
    "expm1_": (1.8, np.expm1),
    "log_": (1.1, np.log),
    "log1p_": (1.5, np.log1p),
    "tanh_": (1.4, np.tanh),
}
SMALLEST = float(np.finfo(np.float32).tiny)


@pytest.fixture(scope="module", params=list(FLAGS))
def functions(request, tmp_path_factory):
    if request.param not in _C.instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    library = tmp_path_factory.mktemp("math") / "functions.so"
    options = ["-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno"]
    command = [COMPILER, *options, "-fno-trapping-math", *FLAGS[request.param]]
    source = [f"-I{CSRC}", str(HERE / "math_functions.cpp"), "-o", str(library)]
    subprocess.run([*command, *source], check=True)
    return ctypes.CDLL(str(library))


def apply(functions, name, x, dtype):
    x = np.ascontiguousarray(x)
    y = np.empty(len(x), dtype)
    getattr(functions, name)(
        ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), ctypes.c_int64(len(x))
    )
    return y


def every_exponent() -> np.ndarray:
    """Return a million floats: every sign and exponent, and the borders of math.hpp's ranges."""
    bits = np.arange(0, 2**32, 4099, dtype=np.uint64).astype(np.uint32)
    edges = [0.0, -0.0, 1.0, 88.7228, 88.7229, -87.336, -87.337, -126.0, -127.0, 25.0, 0.625, 10.0]
    near = [np.nextafter(np.float32(e), np.float32(d)) for e in edges for d in (-np.inf, np.inf)]
    return np.concatenate([bits.view(np.float32), np.array(edges + near, np.float32)])


@pytest.mark.parametrize("name", list(BOUNDS))
def test_error_over_every_exponent(functions, name):
    bound, truth_of = BOUNDS[name]
    x = every_exponent()
    if name == "exp2_nonpositive":
        x = x[(x <= 0) | np.isnan(x)]
    got = apply(functions, name, x, np.float32)
    with np.errstate(all="ignore"):
        got = got.astype(np.float64)
        truth = truth_of(x.astype(np.float64))
        nearest = truth.astype(np.float32).astype(np.float64)
    assert (np.isnan(got) == np.isnan(truth)).all()
    assert (got[np.isinf(nearest)] == nearest[np.isinf(nearest)]).all()
    numbers = np.isfinite(nearest)
    x, got, truth = x[numbers], got[numbers], truth[numbers]
    assert np.isfinite(got).all()
    size = np.maximum(np.abs(truth), SMALLEST)
    error = np.abs(got - truth) / np.exp2(np.floor(np.log2(size)) - 23)
    flushed = (np.abs(truth) < 2 * SMALLEST) & (got == 0)
    worst = np.argmax(np.where(flushed, 0, error))
    assert error[worst] <= bound or flushed[worst], f"{error[worst]:.2f} ulp at {x[worst]!r}"


def test_exact_values(functions):
    for name, x, y in (
        ("exp2_nonpositive", [0, -0.0, -np.inf], [1, 1, 0]),
        ("exp_", [0, -np.inf, np.inf], [1, 0, np.inf]),
        ("expm1_", [0, -np.inf, np.inf], [0, -1, np.inf]),
        ("log_", [1, 0, np.inf], [0, -np.inf, np.inf]),
        ("log1p_", [0, -1, np.inf], [0, -np.inf, np.inf]),
        ("tanh_", [0, -np.inf, np.inf], [0, -1, 1]),
    ):
        assert apply(functions, name, np.float32(x), np.float32).tolist() == y


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_halves_are_widened_exactly(functions, half):
    bits = np.arange(2**16, dtype=np.uint16)
    got = torch.from_numpy(apply(functions, f"widen_{half}", bits, np.float32))
    expected = torch.from_numpy(bits.view(np.int16)).view(getattr(torch, half)).float()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_floats_are_rounded_to_the_nearest_half(functions, half):
    """Test ties too, which every_exponent rarely has: all halves and their midpoints."""
    bits = torch.arange(2**15 - 1, dtype=torch.int32).to(torch.int16)
    halves = bits.view(getattr(torch, half)).double()
    middle = ((halves[1:] + halves[:-1]) / 2).float().numpy()
    x = np.concatenate([every_exponent(), middle, -middle, halves.float().numpy()])
    got = torch.from_numpy(apply(functions, f"narrow_{half}", x, np.uint16).view(np.int16))
    expected = torch.from_numpy(x).to(getattr(torch, half))
    torch.testing.assert_close(got.view(expected.dtype), expected, rtol=0, atol=0, equal_nan=True)
