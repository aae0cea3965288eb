"""Decoding steps recorded once and replayed, as CUDA graphs.

A step of a small model launches hundreds of kernels that take a few microseconds each, less than
launching each from Python takes. A graph launches all of them at once. It holds addresses and sizes
of the recorded step: the number of rows, and of the cache columns read, are rounded up, so that a
few graphs serve every step.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch

Step = Callable[[], None]

Capture = Callable[[Step], Step]
"""Runs a step once, and returns a function that runs it again."""

COLUMNS = 256
FEWEST_ROWS = 8  # fewer rows take as long: the time of such a step goes into reading weights


def as_it_is(step: Step) -> Step:
    """Run ``step`` and return it: record nothing, run it from Python every time."""
    step()
    return step


def cuda_graphs(device: torch.device) -> Capture:
    """Return what captures steps on ``device``.

    All captured steps use the same memory, so that no two of them may run at a time.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    device = torch.device("cuda", index)
    room = _room(device)

    def capture(step: Step) -> Step:
        graph = room.record(step)
        graph.replay()
        return graph.replay

    return capture


@cache
def _room(device: torch.device) -> _Room:
    """Return the _Room of a device, one per process: cuBLAS keeps 32 MiB per stream it ran on."""
    return _Room(device)


class _Room:
    """Stream that graphs of a device are captured on, and the memory pool that they share."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool: Any = torch.cuda.graph_pool_handle()
        # torch drops a pool with its last graph and cannot use it again: this graph keeps it
        self._first = self.record(lambda: torch.zeros(1, dtype=torch.float32, device=device))

    def record(self, step: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            with torch.cuda.stream(self.stream), _recording(graph, self.pool, self.device):
                step()  # launches nothing yet
        return graph


@contextmanager
def _recording(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> Iterator[None]:
    """Within the block, record launches into ``graph``.

    ``torch.cuda.graph`` does so too, but it first gives all cached memory back to the driver. If
    the block raises, it leaves the allocator and the random generator in the middle of a capture,
    so that memory is never freed and ``torch.randn`` fails from then on.
    """
    try:
        # thread_local: calls of other threads do not make the capture fail
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        yield
        graph.capture_end()
    except BaseException:
        with suppress(RuntimeError):  # says that the capture failed
            graph.capture_end()
        with suppress(RuntimeError):  # capture_end may have done this already
            torch._C._cuda_endAllocateToPool(device.index, pool)
        generator = torch.cuda.default_generators[device.index]
        generator.graphsafe_set_state(generator.clone_state())
        raise


def never_waiting(device: torch.device) -> Capture:
    """Return a Capture that records nothing, but raises if a step waits for the device.

    A CUDA graph cannot hold such a wait. The RuntimeError names the line that waits, which the
    error of a failed capture does not.
    """

    def capture(step: Step) -> Step:
        def checked() -> None:
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            except RuntimeError as error:
                raise RuntimeError(f"{first_line(error)}, in {_raised_at(error)}") from error
            finally:
                torch.cuda.set_sync_debug_mode(before)

        checked()
        return checked

    return capture


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text."""
    return str(error).strip().partition("\n")[0]


def _raised_at(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno} ({frame.line})"


class Steps:
    """Recordings of a step, one per shape (rows and columns, both rounded up).

    The first step of a shape runs from Python: kernels are compiled and libraries set up while
    nothing records. The second step is captured. Recordings are freed with this object.

    Args:
        columns: the most there are.
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._recorded: dict[tuple[int, int], Step | None] = {}

    def run(
        self,
        step: Callable[[int, int], None],
        rows: int,
        columns: int,
        capture: Capture | None,
        *,
        most_rows: int,
    ) -> None:
        """Run ``step(rows, columns)``, or a recording of it with at least as many of both.

        Args:
            step: reads and writes tensors whose addresses stay the same; the same step at every
                call.
            rows, columns: those of this step.
            capture: records a step; None: the step runs from Python.
            most_rows: rows that the step may have, at most.
        """
        if capture is None:
            step(rows, columns)
            return
        shape = min(row_bucket(rows), most_rows), min(round_up(columns, COLUMNS), self.columns)
        if shape not in self._recorded:
            self._recorded[shape] = None
            step(*shape)
        elif (replay := self._recorded[shape]) is not None:
            replay()
        else:
            self._recorded[shape] = capture(lambda: step(*shape))


def row_bucket(rows: int) -> int:
    """Round up to 8, 16, 32, 64, then to multiples of a quarter of the next power of two.

    Each shape costs a capture, which takes as long as several steps; a few more rows cost a step
    little.
    """
    rows = max(rows, FEWEST_ROWS)
    power = 1 << (rows - 1).bit_length()
    return power if rows <= 64 else round_up(rows, power // 4)


def round_up(number: int, multiple: int) -> int:
    """Round ``number`` up to the next multiple."""
    return -(-number // multiple) * multiple
