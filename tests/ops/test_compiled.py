"""The code that the Triton kernels are compiled to, for every architecture, without a GPU.

compiled.json has the figures of each kernel when it was last reviewed, and its source's hash. After
a change, run ``make compiled`` and review the changes of compiled.json.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import multiprocessing
import os
import re
import textwrap
import tokenize
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import triton
from stub_gpu import ARCHITECTURES, SHARED_BYTES, Launched, stub_gpu
from triton_cases import CASES

RECORD = Path(__file__).with_name("compiled.json")
REGENERATE = "run `make compiled` and look at what it changes in tests/ops/compiled.json"

# Kernels that are to move data as fast as memory goes: the arguments that each reads and writes a
# block of. Rows of logits are read 16 bytes at once wherever they start.
STREAMING = {
    "logprobs_forward_kernel": (["logits"], []),
    "logprobs_backward_kernel": (["logits"], ["grad_logits"]),
    "fold_tile_kernel": (["products"], []),
    "tile_gradient_kernel": (["products"], ["gradient"]),
}
# The same where rows start on 16 bytes, or the tokens of a batch are a multiple of 4: the noise of
# a draw takes longer than its logits, and tokens are few.
WHERE_ALIGNED = {
    "sample_kernel": (["logits"], []),
    "sample_truncated_kernel": (["logits"], []),
    "kl_estimate_kernel": (["logprobs", "ref_logprobs"], ["estimate", "slope"]),
    "ppo_loss_kernel": (["logprobs", "old_logprobs", "advantages"], ["grad_logprobs"]),
    "value_loss_kernel": (["values", "returns"], ["grad_values"]),
    "whiten_kernel": (["values"], ["whitened"]),
    "whiten_backward_kernel": (["grad_whitened", "whitened"], ["grad_values"]),
    "decode_attention_kernel": (["keys", "values"], []),
}
# These copy the next block into shared memory while they multiply one. They do where rows start on
# 16 bytes, as in every model's cache; elsewhere they work, but slowly.
READ_AHEAD = {"decode_attention_kernel"}
# 16 warps of 32 lanes with 32 bytes each on their way are 16 KB a multiprocessor: what an H100
# needs in flight (3.35 TB/s * 0.6 us / 132).
MIN_RESIDENT_WARPS = 16
MIN_IN_FLIGHT = 16 * 1024
# The same by Triton and kernel, where another Triton than the recorded one makes less of it: 3.6.0
# and 3.8.0 give variants of ppo_loss 130 registers and more, so that three programs fit, not four.
FEWER_WARPS = {(version, "ppo_loss_kernel"): 12 for version in ("3.6.0", "3.8.0")}


class Facts(NamedTuple):
    """Figures of a kernel's compiled code that the tests check."""

    kernel: str
    registers: int
    stack: int
    shared: int
    num_warps: int
    block: int
    resident_warps: int
    resident_shared: int
    """Bytes of the programs that a multiprocessor has at once."""
    budget: int
    """Registers, as the launch table says."""
    loaded: int
    """Bytes that a program loads 16 or more at once; what stands in a loop counts once."""
    stored: int
    """Bytes that it stores so."""
    to_load: int
    """Bytes of a block of each argument that STREAMING names."""
    to_store: int
    float64: bool

    def describe(self) -> str:
        return (
            f"{self.registers} registers, {self.shared} bytes shared, "
            f"{self.num_warps} warps, block {self.block}"
        )


def variants(arch: int) -> list[tuple[str, torch.dtype, bool]]:
    """Return the variants compiled for ``arch``: name of the case, dtype, whether aligned.

    float16, which differs from bfloat16 in its conversions alone, for 90 only; cases that are not
    common for 90 and the newest. Where others stand for them (86 and 89 have what 80 has, with less
    shared memory, and 100 what 90 has), of the logits' dtypes bfloat16 alone.
    """
    return [
        (name, dtype, aligned)
        for name, case in CASES.items()
        if case.common or arch in (90, 120)
        for dtype in case.dtypes
        if dtype != torch.float16 or (arch == 90 and case.common)
        if dtype != torch.float32 or case.dtypes == (dtype,) or arch in (80, 90, 120)
        for aligned in (True, False)
    ]


def title(name: str, dtype: torch.dtype, aligned: bool) -> str:
    dtype_name = str(dtype).removeprefix("torch.")
    return f"{name}, {dtype_name}, {'aligned' if aligned else 'unaligned'}"


def wide_bytes(ptx: str, instruction: str) -> int:
    found = re.findall(rf"\b{instruction}\.global[.:\w]*\.v(\d)\.[bfus](\d+)", ptx)
    widths = [int(count) * int(bits) // 8 for count, bits in found]
    return sum(width for width in widths if width >= 16)


def copied_bytes(ptx: str) -> int:
    """Return the bytes that copies of 16 bytes into shared memory move."""
    return 16 * len(re.findall(r"cp\.async\.cg\.shared\.global [^;]*, 0x10,", ptx))


def facts_of(launched: Launched) -> Facts:
    code, threads = launched.code, 32 * launched.code.num_warps
    read, written = (STREAMING | WHERE_ALIGNED).get(code.name, ([], []))

    def block_bytes(argument: str) -> int:
        columns = launched.how.block * launched.arguments.get("HEAD_SIZE", 1)
        return columns * launched.arguments[argument].element_size()

    return Facts(
        kernel=code.name,
        registers=code.registers,
        stack=code.stack,
        shared=code.shared,
        num_warps=code.num_warps,
        block=launched.how.block,
        resident_warps=code.resident_warps,
        resident_shared=code.shared * code.resident_warps // code.num_warps,
        budget=launched.how.registers,
        loaded=threads * (wide_bytes(code.ptx, "ld") + copied_bytes(code.ptx)),
        stored=threads * wide_bytes(code.ptx, "st"),
        to_load=sum(block_bytes(name) for name in read),
        to_store=sum(block_bytes(name) for name in written),
        float64=".f64" in code.ptx,
    )


def compile_for(arch: int) -> dict[str, list[Facts]]:
    """Return the facts of all kernels, by the variant's title."""
    facts = {}
    for name, dtype, aligned in variants(arch):
        with stub_gpu(arch) as launched:
            CASES[name].run(6, 4096 if aligned else 507, dtype, aligned=aligned)
        once = {id(x.code): x for x in launched}
        facts[title(name, dtype, aligned)] = [facts_of(x) for x in once.values()]
    return facts


def compile_for_all() -> dict[int, dict[str, list[Facts]]]:
    # A fork would inherit OpenMP's locks as held, by threads that the fork does not have.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 6), mp_context=context) as pool:
        return dict(zip(ARCHITECTURES, pool.map(compile_for, ARCHITECTURES), strict=True))


@cache
def kernels() -> dict[str, str]:
    """Return the hashes of the sources of all kernels that the cases launch, by name."""
    hashes = {}
    for name, case in CASES.items():
        with stub_gpu(90) as launched:
            case.run(6, 4096, case.dtypes[0])
        assert launched, name
        hashes |= {x.code.name: source_hash(x.code.fn) for x in launched}
    return hashes


def source_hash(fn: Any) -> str:
    """Return the hash of a kernel's source and of all it uses, without comments and blank lines."""
    parts: dict[str, str] = {}
    collect_sources(fn, parts)
    return hashlib.sha256("\n".join(parts[name] for name in sorted(parts)).encode()).hexdigest()


def collect_sources(fn: Any, parts: dict[str, str]) -> None:
    source = textwrap.dedent(inspect.getsource(fn.fn))
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    unseen = (tokenize.COMMENT, tokenize.NL)
    parts[fn.__name__] = " ".join(token.string for token in tokens if token.type not in unseen)
    for name in {token.string for token in tokens if token.type == tokenize.NAME} - set(parts):
        used = fn.fn.__globals__.get(name)
        if isinstance(used, triton.runtime.JITFunction):
            collect_sources(used, parts)
        elif isinstance(used, triton.language.constexpr):
            parts[name] = repr(used.value)


def described(compiled: dict[int, dict[str, list[Facts]]]) -> dict[str, dict[str, list[str]]]:
    """Return the contents of compiled.json: by kernel and variant, by architecture."""
    lines: dict[str, dict[str, list[str]]] = {}
    for arch, by_variant in compiled.items():
        for variant, facts in by_variant.items():
            for code in facts:
                by_arch = lines.setdefault(f"{code.kernel}: {variant}", {})
                by_arch.setdefault(f"sm_{arch}", []).append(code.describe())
    return lines


def recorded() -> dict[str, Any]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {"triton": "", "sources": {}}


of_the_record = pytest.mark.skipif(
    recorded()["triton"] not in ("", triton.__version__),
    reason=f"Triton {triton.__version__}: budgets and record are of {recorded()['triton']}",
)


@pytest.fixture(scope="module")
def compiled() -> dict[int, dict[str, list[Facts]]]:
    return compile_for_all()


@pytest.fixture(params=ARCHITECTURES)
def codes(request, compiled) -> list[tuple[str, Facts]]:
    """Return the names and facts of the kernels of one architecture."""
    return [
        (f"sm_{request.param}, {variant}: {code.kernel}", code)
        for variant, facts in compiled[request.param].items()
        for code in facts
    ]


@pytest.mark.slow
def test_no_kernel_spills_registers(codes):
    """Another version of Triton may spill two numbers per thread.

    Without a register limit its ptxas saves registers, so that one more program fits a
    multiprocessor (3.9.0 does in two kernels).
    """
    most = 0 if recorded()["triton"] in ("", triton.__version__) else 8
    assert [f"{name}: {code.stack} bytes" for name, code in codes if code.stack > most] == []


@pytest.mark.slow
@of_the_record
def test_registers_are_within_the_budget_of_the_launch_table(codes):
    over = [f"{n}: {c.registers} of {c.budget}" for n, c in codes if c.registers > c.budget]
    assert not over, "\n".join(over)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shared_memory_is_within_the_limit_of_a_program(compiled, arch):
    every = [code for facts in compiled[arch].values() for code in facts]
    assert [code for code in every if code.shared > 1024 * SHARED_BYTES[arch]] == []


@pytest.mark.slow
def test_compiled_code_computes_nothing_in_float64(codes):
    assert [name for name, code in codes if code.float64] == []


@pytest.mark.slow
def test_streaming_kernels_move_16_bytes_at_once(codes):
    narrow = [
        f"{name}: loads {code.loaded} of {code.to_load}, stores {code.stored} of {code.to_store}"
        for name, code in codes
        if ", aligned" in name or code.kernel in STREAMING
        if code.loaded < code.to_load * (2 if code.kernel in READ_AHEAD else 1)
        or (code.stored < code.to_store and ", aligned" in name)
    ]
    assert not narrow, "\n".join(narrow)


@pytest.mark.slow
def test_enough_warps_fit_a_multiprocessor(codes):
    few = [
        f"{name}: {code.resident_warps}"
        for name, code in codes
        if code.kernel not in READ_AHEAD
        and code.resident_warps
        < FEWER_WARPS.get((triton.__version__, code.kernel), MIN_RESIDENT_WARPS)
    ]
    assert not few, "\n".join(few)


@pytest.mark.slow
def test_kernels_that_read_ahead_have_enough_bytes_in_flight(codes):
    little = [
        f"{n}: {c.resident_shared}"
        for n, c in codes
        if c.kernel in READ_AHEAD and ", aligned" in n and c.resident_shared < 2 * MIN_IN_FLIGHT
    ]
    assert not little, "\n".join(little)


def test_every_changed_kernel_was_reviewed():
    before, now = recorded()["sources"], kernels()
    changed = [name for name in now | before if now.get(name) != before.get(name)]
    assert changed == [], REGENERATE


@pytest.mark.slow
@of_the_record
def test_compiled_code_equals_the_reviewed_code(compiled):
    assert described(compiled) == recorded()["code"], REGENERATE


if __name__ == "__main__":
    content = {
        "triton": triton.__version__,
        "sources": kernels(),
        "code": described(compile_for_all()),
    }
    RECORD.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
