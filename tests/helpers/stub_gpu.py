"""Triton's real launcher on a stub of a GPU: the code it compiles, and the launches.

Within ``stub_gpu(arch)`` a launcher of ppo_fast, called on CPU tensors, compiles its kernels for
that architecture as the launcher on a GPU would (the same specialisations), and then records the
launch instead of making it. Outputs stay as they were allocated.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from ppo_fast.ops.backends import triton_launch

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SHARED_BYTES = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a program may have
# A multiprocessor, by the table "Technical Specifications per Compute Capability" of the CUDA
# programming guide; KiB of shared memory, of which each program takes one more than it asks for.
SM_WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
SM_PROGRAMS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
SM_SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
SM_REGISTERS = 65536
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Code:
    """A kernel as it was compiled for one architecture."""

    def __init__(self, compiled: Any, arch: int) -> None:
        self.name: str = compiled.name
        self.fn: Any = compiled.src.fn
        """What was decorated."""
        names = compiled.src.fn.arg_names
        self.types: dict[str, str] = {name: compiled.src.signature[name] for name in names}
        """Of its arguments: "*bf16", "i64", "fp32"; "constexpr" for those compiled in."""
        self.aligned = {names[index[0]] for index, hints in compiled.src.attrs.items() if hints}
        """Pointers that it takes to lie on 16 bytes."""
        self.arch = arch
        self.num_warps: int = compiled.metadata.num_warps
        self.shared: int = compiled.metadata.shared
        """Bytes a program."""
        self.ptx: str = compiled.asm["ptx"]
        self._cubin: bytes = compiled.asm["cubin"]

    @cached_property
    def _resources(self) -> dict[str, int]:
        """Return registers and stack per thread."""
        usage = self._inspect("cuobjdump", "--dump-resource-usage")
        return {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK")}

    @property
    def registers(self) -> int:
        return self._resources["REG"]

    @property
    def stack(self) -> int:
        """Bytes of stack per thread, which spilled registers take."""
        return self._resources["STACK"]

    @property
    def resident_warps(self) -> int:
        """Warps that fit a multiprocessor, by registers, shared memory and its other limits."""
        registers_a_warp = -(-self.registers * 32 // 256) * 256
        programs = min(
            SM_WARPS[self.arch] // self.num_warps,
            SM_PROGRAMS[self.arch],
            SM_REGISTERS // registers_a_warp // self.num_warps,
            SM_SHARED[self.arch] * 1024 // (self.shared + 1024),
        )
        return programs * self.num_warps

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's warps that can be resident at once."""
        return self.resident_warps / SM_WARPS[self.arch]

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


class Launched(NamedTuple):
    """A launch that was recorded."""

    code: Code
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    """By the kernel's names, constexprs among them."""
    how: triton_launch.Launch
    """The entry of the launch table."""


class _StubDriver(DriverBase):
    def __init__(self, arch: int) -> None:
        super().__init__()
        self.arch = arch
        self.launched: list[Launched] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": SHARED_BYTES[arch] * 1024},
            # module, function, registers, spills, threads
            load_binary=lambda *_: (0, 0, 0, 0, 1024),
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
            # stream, function, two of metadata, two hooks
            arguments = dict(zip(source.fn.arg_names, rest[6:], strict=True))
            # A kernel keeps its launcher, so this may be that of an earlier stub.
            active = triton.runtime.driver.active
            active.launched.append(Launched(code[0], (x, y, z), arguments, _table_entry()))

        return run


def _table_entry() -> triton_launch.Launch:
    """Return the Launch that ``triton_launch.launch``, further up the stack, was called with."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not triton_launch.launch.__code__:
        frame = frame.f_back
    assert frame is not None, "a kernel was not launched by gpu.launch"
    return frame.f_locals["how"]


@contextmanager
def stub_gpu(arch: int) -> Iterator[list[Launched]]:
    """Within the block, record the launches, compiled for an NVIDIA GPU of this architecture."""
    driver, config = _StubDriver(arch), triton.runtime.driver
    # Reading the active driver before one was set would search for a GPU.
    place = "_active" if hasattr(config, "_active") else "active"  # as Triton 3.4 has it
    active = getattr(config, place)
    config.set_active(driver)
    try:
        yield driver.launched
    finally:
        setattr(config, place, active)
