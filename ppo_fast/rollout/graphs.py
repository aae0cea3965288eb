"""Decoding steps recorded once and replayed: CUDA graphs.

A step of a small model launches hundreds of kernels that each take a few microseconds, less than
launching them from Python does. A graph launches all of them at once. It holds addresses and sizes
as they were: the number of rows, and of the cache's columns looked at, are rounded up, so that a
few graphs serve every step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Step = Callable[[], None]

Capture = Callable[[Step], Step]
"""Runs a step once, and returns what runs it again."""

COLUMNS = 256


def as_it_is(step: Step) -> Step:
    """Records nothing: runs the step from Python every time."""
    step()
    return step


def cuda_graphs(device: torch.device) -> Capture:
    """Captures what steps launch on ``device``. No two of them run at a time: all use the same
    memory."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def capture(step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do meanwhile is no error
        mode = "thread_local"
        with (
            torch.cuda.device(device),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode),
        ):
            step()  # launches nothing yet
        graph.replay()
        return graph.replay

    return capture


class Steps:
    """Calls ``step(rows, columns)``, or with ``capture`` a recording of it with no fewer of both.

    A shape's first step runs as it is: kernels are compiled and libraries set up where nothing
    records. Its second is captured. What was recorded is freed with this object.

    Args:
        step: what is to run, on tensors that stay where they are.
        rows, columns: the most of each.
        capture: None: every step runs as it is, with as many rows and columns as it has.
    """

    def __init__(
        self,
        step: Callable[[int, int], None],
        rows: int,
        columns: int,
        capture: Capture | None = None,
    ) -> None:
        self.step, self.rows, self.columns, self.capture = step, rows, columns, capture
        self._recorded: dict[tuple[int, int], Step | None] = {}

    def __call__(self, rows: int, columns: int) -> None:
        if self.capture is None:
            self.step(rows, columns)
            return
        shape = min(row_bucket(rows), self.rows), min(_up(columns, COLUMNS), self.columns)
        if shape not in self._recorded:
            self._recorded[shape] = None
            self.step(*shape)
        elif (replay := self._recorded[shape]) is not None:
            replay()
        else:
            self._recorded[shape] = self.capture(lambda: self.step(*shape))


def row_bucket(rows: int) -> int:
    """Powers of two up to 8; then multiples of 8 and, from 64 on, of an eighth of the next power of
    two: beyond 32 rows, less than a quarter more."""
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    return _up(rows, max(8, (1 << (rows - 1).bit_length()) // 8))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
