"""Kernels access no memory outside their tensors, and write all of their outputs."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from interpreted import assert_same_bits, example_of, needs_interpreter, outputs, variants
from placed import Allocations, filled, guarded
from torch import Tensor
from triton_cases import CASES

pytestmark = needs_interpreter


@pytest.fixture(scope="module")
def exit_code():
    """Return exit_code(function, *arguments): the exit code of a process that runs the function.

    It is minus the number of the signal that ended the process, if one did. The process is forked
    from one that has no threads.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda *task: pool.submit(exit_code_of_fork, *task).result()


def exit_code_of_fork(function, *arguments) -> int:
    torch.set_num_threads(1)
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def run_between_guards(name: str, dtype: torch.dtype, at_end: bool, aligned: bool) -> None:
    launcher, arguments = CASES[name].prepare(example_of(CASES[name], dtype, aligned=aligned))

    def place(tensor: Tensor) -> Tensor:
        return guarded(tensor, at_end=at_end)

    arguments = [place(x) if isinstance(x, Tensor) else x for x in arguments]
    with Allocations(place):
        outputs(launcher, arguments)


def read_a_byte_too_far(at_end: bool) -> None:
    tensor = guarded(torch.arange(5, dtype=torch.int32), at_end=at_end)
    ctypes.string_at(tensor.data_ptr() + (tensor.nbytes if at_end else -1), 1)


@pytest.mark.parametrize("at_end", [True, False])
def test_access_to_a_protected_page_ends_the_process(exit_code, at_end):
    assert exit_code(read_a_byte_too_far, at_end) == -signal.SIGSEGV


@pytest.mark.parametrize("aligned", [False, True], ids=["unaligned", "aligned"])
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize(("name", "dtype"), variants())
def test_kernels_access_no_memory_outside_their_tensors(exit_code, name, dtype, at_end, aligned):
    assert exit_code(run_between_guards, name, dtype, at_end, aligned) == 0


@pytest.mark.parametrize(("name", "dtype"), variants())
def test_outputs_do_not_depend_on_the_previous_contents(name, dtype):
    launcher, arguments = CASES[name].prepare(example_of(CASES[name], dtype))
    found = []
    for before in (math.nan, 7.0):
        with Allocations(lambda tensor, before=before: filled(tensor, before)):
            found.append(outputs(launcher, arguments))
    assert_same_bits(*found)
