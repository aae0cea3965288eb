"""Triton's real launcher on a GPU that is not there: what it would compile, and launch how.

Within ``stub_gpu(arch)`` a launcher of ppo_fast, called on CPU tensors, compiles its kernels for
that architecture as the launcher on a GPU would (the same specialisations), and then records the
launch instead of making it. Outputs stay as they were allocated.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SHARED_BYTES = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a program may have
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Code:
    """A kernel as it was compiled for one architecture."""

    def __init__(self, compiled: Any, arch: int) -> None:
        self.name: str = compiled.name
        self.arch = arch
        self.num_warps: int = compiled.metadata.num_warps
        self.shared: int = compiled.metadata.shared
        """Bytes a program."""
        self.ptx: str = compiled.asm["ptx"]
        self._cubin: bytes = compiled.asm["cubin"]

    @cached_property
    def _resources(self) -> dict[str, int]:
        """Registers and stack a thread."""
        usage = self._inspect("cuobjdump", "--dump-resource-usage")
        return {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK")}

    @property
    def registers(self) -> int:
        return self._resources["REG"]

    @property
    def stack(self) -> int:
        """Bytes a thread: what did not fit the registers."""
        return self._resources["STACK"]

    @cached_property
    def sass(self) -> list[str]:
        """The instructions, in order; labels are lines that end with a colon."""
        listing = self._inspect("nvdisasm", "-c")
        lines = (re.sub(r"/\*.*?\*/", "", line).strip() for line in listing.splitlines())
        return [line for line in lines if line.endswith((":", ";"))]

    def _inspect(self, tool: str, *options: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self._cubin)
            file.flush()
            command = [_BINARIES / tool, *options, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Launched:
    """A launch that was recorded."""

    def __init__(self, code: Code, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
        self.code, self.grid, self.arguments = code, grid, arguments


class _StubDriver(DriverBase):
    def __init__(self, arch: int) -> None:
        super().__init__()
        self.arch = arch
        self.launched: list[Launched] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": SHARED_BYTES[arch] * 1024},
            load_binary=lambda *_: (
                0,
                0,
                0,
                0,
                1024,
            ),  # module, function, registers, spills, threads
        )

    def is_active(self) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        kernels = source.fn.device_caches[self.arch][0].values()
        code: list[Code] = []

        def run(x: int, y: int, z: int, *rest: Any) -> None:
            if not code:  # not yet among the kernels when the launcher is made
                code.extend(Code(k, self.arch) for k in kernels if k.src is source)
            # A kernel keeps its launcher, so this may be that of an earlier stub.
            active = triton.runtime.driver.active
            active.launched.append(Launched(code[0], (x, y, z), rest[6:]))

        return run


@contextmanager
def stub_gpu(arch: int) -> Iterator[list[Launched]]:
    """The launches within, in order, as they would be on an NVIDIA GPU of this architecture."""
    driver = _StubDriver(arch)
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    try:
        yield driver.launched
    finally:
        triton.runtime.driver._active = active
