"""Decoding steps recorded once and replayed: CUDA graphs.

A step of a small model launches hundreds of kernels that each take a few microseconds, less than
launching them from Python does. A graph launches all of them at once. It holds addresses and sizes
as they were: the number of rows, and of the cache's columns looked at, are rounded up, so that a
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
"""Runs a step once, and returns what runs it again."""

COLUMNS = 256
FEWEST_ROWS = 8  # fewer take as long: a step then reads weights, and they are the same


def as_it_is(step: Step) -> Step:
    """Records nothing: runs the step from Python every time."""
    step()
    return step


def cuda_graphs(device: torch.device) -> Capture:
    """Captures what steps launch on ``device``. No two of them run at a time: all use the same
    memory."""
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
    """One for the process: cuBLAS keeps 32 MiB for every stream that it ever ran on."""
    return _Room(device)


class _Room:
    """The stream that graphs of a device are captured on, and the memory that they share."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool: Any = torch.cuda.graph_pool_handle()
        # torch drops a pool with its last graph and cannot take it up again: this one stays
        self._first = self.record(lambda: torch.zeros(1, device=device))

    def record(self, step: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            with torch.cuda.stream(self.stream), _recording(graph, self.pool, self.device):
                step()  # launches nothing yet
        return graph


@contextmanager
def _recording(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> Iterator[None]:
    """The block's launches become ``graph``. ``torch.cuda.graph`` does so too, but it gives all
    cached memory back to the driver first and, where the block raises, leaves the allocator and the
    random generator in the middle of a capture, so that memory is never freed and ``torch.randn``
    fails from then on."""
    try:
        # thread_local: what other threads do meanwhile is no error
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        yield
        graph.capture_end()
    except BaseException:
        with suppress(RuntimeError):  # says that the capture failed
            graph.capture_end()
        with suppress(RuntimeError):  # capture_end may have come as far as this
            torch._C._cuda_endAllocateToPool(device.index, pool)
        generator = torch.cuda.default_generators[device.index]
        generator.graphsafe_set_state(generator.clone_state())
        raise


def never_waiting(device: torch.device) -> Capture:
    """Records nothing, but a step that waits for the device, which a capture cannot hold, raises
    RuntimeError that names the line. A capture that fails says less, and too late."""

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
    """Of an error's text."""
    return str(error).strip().partition("\n")[0]


def _raised_at(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno} ({frame.line})"


class Steps:
    """Recordings of a step by its shape, which is rounded up.

    A shape's first step runs as it is: kernels are compiled and libraries set up where nothing
    records. Its second is captured. What was recorded is freed with this object.

    Args:
        rows, columns: the most of each.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self._recorded: dict[tuple[int, int], Step | None] = {}

    def run(
        self, step: Callable[[int, int], None], rows: int, columns: int, capture: Capture | None
    ) -> None:
        """Run ``step(rows, columns)``, or a recording of it with no fewer of both.

        Args:
            step: reads and writes tensors that stay where they are, the same at every call.
            rows, columns: of this step.
            capture: records a step; None: it runs as it is.
        """
        if capture is None:
            step(rows, columns)
            return
        shape = min(row_bucket(rows), self.rows), min(round_up(columns, COLUMNS), self.columns)
        if shape not in self._recorded:
            self._recorded[shape] = None
            step(*shape)
        elif (replay := self._recorded[shape]) is not None:
            replay()
        else:
            self._recorded[shape] = capture(lambda: step(*shape))


def row_bucket(rows: int) -> int:
    """8, 16, 32, 64, then multiples of a quarter of the next power of two. Each shape costs a
    capture, which takes as long as several steps, and a few more rows cost a step little."""
    rows = max(rows, FEWEST_ROWS)
    power = 1 << (rows - 1).bit_length()
    return power if rows <= 64 else round_up(rows, power // 4)


def round_up(number: int, multiple: int) -> int:
    """To the next multiple."""
    return -(-number // multiple) * multiple
