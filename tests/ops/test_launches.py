"""The arguments that Triton's real launcher passes to a stub of the GPU's driver."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ppo_fast.ops.backends import library

pytest.importorskip("triton")

from gpu_works import Blank
from stub_gpu import Launched, stub_gpu
from triton_cases import CASES, Example

pytestmark = pytest.mark.parametrize("name", CASES)

FLOAT32 = torch.float32


def launches(name: str, example: Example) -> list[Launched]:
    with stub_gpu(90) as launched:
        launcher, arguments = CASES[name].prepare(example)
        launcher(*arguments)
    return launched


def codes_by_kernel(launched: list[Launched]) -> dict[str, set[int]]:
    codes: dict[str, set[int]] = {}
    for x in launched:
        codes.setdefault(x.code.name, set()).add(id(x.code))
    return codes


@pytest.mark.slow
def test_other_lengths_and_numbers_do_not_recompile(name):
    random = torch.Generator().manual_seed(0)
    launched = []
    for i in range(50):
        rows, columns = (1 + torch.randint(6, (), generator=random).item()), 1 + 61 * i
        example = Example(rows, columns, FLOAT32, aligned=i % 4 < 2)
        with stub_gpu(90) as some:
            launcher, arguments = CASES[name].prepare(example)
            factor = 1 / (1 + i)
            launcher(*(x * factor if isinstance(x, float) else x for x in arguments))
        launched += some
    assert {kernel: n for kernel, n in codes_by_kernel(launched).items() if len(n) > 4} == {}


def test_sizes_are_int64_and_numbers_float32(name):
    for launch in launches(name, Example(6, 507, FLOAT32, aligned=True)):
        for argument, value in launch.arguments.items():
            type_of = launch.code.types[argument]
            if type_of != "constexpr" and not isinstance(value, Tensor):
                assert type_of == ("fp32" if isinstance(value, float) else "i64"), argument


@pytest.mark.slow
@pytest.mark.parametrize("aligned", [True, False])
def test_addresses_of_logits_are_multiples_of_16_bytes(name, aligned):
    for dtype in CASES[name].dtypes:
        for launch in launches(name, Example(6, 507, dtype, aligned)):
            if "logits" in launch.arguments:
                assert launch.arguments["logits"].data_ptr() % 16 == 0
                assert "logits" in launch.code.aligned


@pytest.mark.parametrize("more", [0, 1])
def test_more_elements_than_int32_can_index(name, more):
    dtype = CASES[name].dtypes[-1]
    small = launches(name, Example(6, 4096 + more, dtype, aligned=True))
    large = launches(name, Blank(2**17 + more, 2**15 + more, dtype))
    for launch in large:
        x, y, z = launch.grid
        assert 0 < x < 2**31
        assert (y, z) == (1, 1)
    assert codes_by_kernel(large) == codes_by_kernel(small)


@pytest.mark.parametrize("size", [(6, 507), (1, 1), (0, 507), (0, 0), (6, 0)])
def test_outputs_have_the_shapes_of_the_fake_kernel(name, size):
    folder, _, function = CASES[name].launcher.partition("/")
    if size[1] == 0 and folder in ("logprobs", "linear_logprobs", "sample_tokens"):
        pytest.skip("an empty vocabulary is refused")
    with FakeTensorMode():
        _, arguments = CASES[name].prepare(Blank(*size, FLOAT32))
        promised = getattr(library, function)["triton"](*arguments)
    with stub_gpu(90) as launched:
        returned = CASES[name].run(*size)
    for got, expected in zip(as_tuple(returned), as_tuple(promised), strict=True):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    # CUDA refuses a grid of size 0.
    assert all(launch.grid[0] > 0 for launch in launched)


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs
