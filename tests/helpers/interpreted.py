"""Settings of Triton's interpreter for tests: small blocks, other orders, overflow checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton_cases import CASES, Case, Example

from ppo_fast.ops.backends import triton_launch
from ppo_fast.ops.decode_attention import triton as decode_attention
from ppo_fast.ops.gae import triton as gae
from ppo_fast.ops.linear_logprobs import triton_tiles

needs_interpreter = pytest.mark.skipif(
    not triton_launch.interpreted(),
    reason="needs CPU tensors: a GPU allows no choice of addresses or of the order of programs",
)

# Rows and columns: several blocks, the last one not full.
_SIZES = {
    "logprobs": (3, 5003),
    "linear_logprobs": (3, 2507),
    "sample_tokens": (3, 5003),
    "gae": (2, 77),
    "whiten": (3, 3011),
    "decode_attention": (3, 203),
}


@contextmanager
def small_parts() -> Iterator[None]:
    """Within the block, make blocks and tiles small, so that small inputs have several.

    In the interpreter a scan costs 0.3 ms per lane, and a tile of the vocabulary is as large as
    memory allows.
    """
    with (
        patch.multiple(
            decode_attention, CHUNK=32, COMBINE=decode_attention.COMBINE._replace(block=2)
        ),
        patch.object(gae, "SCAN", gae.SCAN._replace(block=64)),
        patch.multiple(triton_tiles, _TILE_BYTES=1024, _MIN_COLUMNS=1024),
    ):
        yield


def variants() -> list[tuple[str, torch.dtype]]:
    """Return names of cases with dtypes; cases that are not common have float32 only."""
    return [
        (name, dtype)
        for name, case in CASES.items()
        for dtype in case.dtypes[: 2 if case.common else 1]
    ]


def example_of(case: Case, dtype: torch.dtype, *, aligned: bool = False) -> Example:
    rows, columns = _SIZES.get(case.launcher.partition("/")[0], (5, 507))
    if aligned:
        columns = -(-columns // 8) * 8  # 16 bytes of the smallest numbers
    return Example(rows, columns, dtype, aligned)


def outputs(launcher: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    """Return the outputs without linear_logprobs' kept tiles, whose ends are not filled."""
    with small_parts():
        returned = launcher(*arguments)
    returned = [returned] if isinstance(returned, Tensor) else list(returned)
    return returned[:3] if launcher.__name__ == "linear_logprobs_forward" else returned


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@contextmanager
def backwards() -> Iterator[None]:
    """Within the block, run the programs of a grid in reverse order."""
    builder = interpreter.interpreter_builder
    set_index = builder.set_grid_idx
    with patch.object(
        builder, "set_grid_idx", lambda x, y, z: set_index(builder.grid_dim[0] - 1 - x, y, z)
    ):
        yield


@contextmanager
def overflow_checked() -> Iterator[None]:
    """Within the block, int32 overflow raises; memory is not copied to a device and back."""
    options = interpreter.InterpreterOptions(debug=True)
    with (
        patch.object(interpreter.interpreter_builder, "options", options),
        patch.object(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None),
    ):
        yield
