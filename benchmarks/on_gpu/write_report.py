"""Write docs/gpu_measured.md from the results of runs on a GPU.

python benchmarks/on_gpu/write_report.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "gpu_measured.md"
GPU = "H200"

# The names of works in gpu_computed.json.
COMPUTED = {
    "logprobs_from_logits, 8192 x 151936 bfloat16": (
        "log-prob and entropy, forward, 8192 x 151936"
    ),
    "logprobs_from_logits, 8192 x 151936 bfloat16, forward and backward": (
        "log-prob and entropy, forward and backward, 8192 x 151936"
    ),
    "linear_logprobs, 4096 x 4096 x 128256 bfloat16, forward and backward, "
    "with entropy, trained head": (
        "linear_logprobs, 4096 x 4096 x 128256, forward and backward, kept"
    ),
    "gae, 8192 x 2048, ragged mask": "gae, 8192 x 2048",
    "gae, 64 x 1024, ragged mask": "gae, 64 x 1024",
    "sample_tokens, 64 x 151936": "sample_tokens, 64 x 151936, noise in every block",
}

Finding = dict[str, Any]


def read(name: str) -> list[Finding]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def of(findings: Iterable[Finding], stage: str, **wanted: Any) -> list[Finding]:
    return [
        f
        for f in findings
        if f["stage"] == stage and all(f.get(name) == value for name, value in wanted.items())
    ]


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return [*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]


def machine(now: list[Finding]) -> list[str]:
    (found,), (ceilings,) = of(now, "machine"), of(now, "ceilings")
    return [
        f"{found['gpu']}, {found['multiprocessors']} multiprocessors, {found['GiB']:.0f} GiB; "
        f"Python {found['python']}, torch {found['torch']}, Triton {found['triton']}, "
        f"transformers {found['transformers']}. Copying reaches {ceilings['copy_gb_s']:.0f} GB/s "
        f"(read and written), bfloat16 products {ceilings['bf16_tflop_s']:.0f} TFLOP/s, float32 "
        f"{ceilings['float32_tflop_s']:.0f}.",
        "",
    ]


def values(now: list[Finding]) -> list[str]:
    (tests,) = of(now, "tests")
    ops = of(now, "doctor: check")
    (memory,) = of(now, "memcheck")
    return [
        f"- {tests['run']} tests of the Triton kernels ran on the GPU (`pytest --triton tests/ops`"
        f"), {tests['failed']} failed; `ppo-fast doctor` calls {sum(f['ok'] for f in ops)} of "
        f"{len(ops)} ops right against float64.",
        f"- compute-sanitizer, memcheck, over every kernel: {memory['found'][-1].lower()}. Its "
        "racecheck names two hazards, both inside a kernel of cuBLAS.",
        "- Decoding: replayed CUDA graphs draw the tokens of steps from Python bit for bit, in "
        "float32 and in bfloat16; in float32 greedy decoding equals `generate` token for token "
        "(in bfloat16 ties part them).",
        "- The first minibatch's ratios are 1 exactly, with bfloat16 computation.",
        "",
    ]


def kernels(now: list[Finding]) -> list[str]:
    computed = json.loads((RESULTS / "gpu_computed.json").read_text())["works"]
    least = {work["work"]: work["gpus"][GPU] for work in computed}
    rows = []
    for finding in of(now, "kernels"):
        ours = finding["side"].startswith("ppo_fast")
        name = COMPUTED.get(finding["work"]) if ours and "recomputed" not in finding["side"] else ""
        bound = f"{least[name]['least']:.3g} ({least[name]['bound']})" if name else ""
        rate = finding.get("gb_s")
        rows.append(
            (
                finding["work"] if ours else "",
                finding["side"],
                f"{finding['ms']:.3g}",
                bound,
                f"{rate:.0f}" if rate and rate > 20 else "",
                f"{finding['megabytes']:.0f}",
            )
        )
    header = ("work", "side", "ms", "least ms, computed", "GB/s", "MB beyond the inputs")
    return [
        "A call from Python costs 0.05 to 0.1 ms, whatever it computes: small works measure that.",
        "",
        *table(header, rows),
    ]


def attention(now: list[Finding]) -> list[str]:
    found = of(now, "attention")
    works = dict.fromkeys(f["work"] for f in found)
    sides = list(dict.fromkeys(f["side"] for f in found))
    rows = []
    for work in works:
        of_work = {f["side"]: f for f in found if f["work"] == work}
        times = [f"{of_work[side]['us']:.3g}" for side in sides]
        rows.append((work, *times, f"{of_work[sides[0]]['gb_s']:.0f}"))
    header = ("work, bfloat16", *(f"{side}, us" for side in sides), "GB/s of ours")
    return table(header, rows)


def decoding(before: list[Finding], now: list[Finding]) -> list[str]:
    rows = []
    for model in ("SmolLM2-135M", "Llama-1B"):
        (graphs,) = of(now, "decoding: speed", model=model, side="graphs")
        (python,) = of(now, "decoding: speed", model=model, side="steps from Python")
        (generate,) = of(now, "decoding: speed", model=model, side="generate")
        (step,) = of(now, "decoding: a step", model=model)
        (first,) = of(before, "decoding: speed", model=model, side="graphs", cudnn=True)
        rows.append(
            (
                model,
                graphs["tokens_s"],
                python["tokens_s"],
                generate["tokens_s"],
                f"{graphs['tokens_s'] / generate['tokens_s']:.1f}x",
                f"{step['median_ms']:.2f}",
                first["tokens_s"],
            )
        )
    header = (
        "random Llama of the size of",
        "tokens/s, graphs",
        "from Python",
        "`generate`",
        "ratio",
        "ms a replayed step",
        "graphs in the first run",
    )
    return table(header, rows)


def steps(before: list[Finding], now: list[Finding]) -> list[str]:
    def row(title: str, finding: Finding) -> tuple[str, ...]:
        times = (finding["seconds"], *(finding[f"time/{part}"] for part in PARTS))
        return (
            title,
            *(f"{time:.2f}" for time in times),
            f"{finding['rollout_tokens_s']:.0f}",
            f"{finding['peak_gb']:.1f}",
        )

    first = {f["case"]: f for f in of(before, "ppo step") if "case" in f}
    today = {f["case"]: f for f in of(now, "step") if "case" in f}
    rows = [
        row("today", today["other prompts: new shapes"]),
        row("today, shapes known", today["the same prompts: shapes known"]),
        row("today, without CUDA graphs", today["without CUDA graphs"]),
        row("first run", first["second, other ragged prompts: new shapes"]),
        row("first run, shapes known", first["the same prompts: shapes known"]),
    ]
    return table(("step", "s", *PARTS, "tokens/s of the rollout", "peak GB"), rows)


PARTS = ("rollout", "experience", "update")


def facts(now: list[Finding]) -> list[str]:
    new = of(now, "new shape", backend="default")
    nan = of(now, "pytorch 196678", backend="default")[0]["nan_in_grad_q"]
    lines = [
        f"- With cuDNN's attention, which this torch prefers, the first use of a shape took "
        f"{min(f['first_s'] for f in new):.2g} to {max(f['first_s'] for f in new):.2g} s (the "
        "memory-efficient kernel 1 ms), the same rollout twice gave other bits, and the case of "
        f"pytorch#196678 gives {nan} NaN in a gradient. ppo_fast turns it off.",
        "- Its passes take no mask, so that flash attention computes grouped queries without "
        "copies. Forward and backward, milliseconds:",
        "",
    ]
    rows = []
    for finding in of(now, "training attention, ms forward and backward"):
        times = json.loads(finding["found"])
        rows.append(
            (
                "{b} x {length}, {h} heads of {size} on {hkv}".format(**finding),
                times["causal gqa flash"],
                times["masked efficient"],
                times["masked cudnn"],
                times["causal gqa cudnn"],
            )
        )
    header = (
        "bfloat16",
        "flash, causal (ours)",
        "memory-efficient, masked",
        "cuDNN, masked",
        "cuDNN, causal",
    )
    return [*lines, *table(header, rows)]


def document() -> str:
    before, now = read("gpu_h200_first_run.jsonl"), read("gpu_h200.jsonl")
    lines = [
        "# Measured on a GPU",
        "",
        "Written by `python benchmarks/on_gpu/write_report.py` from what "
        "`python benchmarks/on_gpu/run.py` found on one machine ([results](../benchmarks/results))."
        " The first run came before what it taught was mended.",
        "",
        *machine(now),
        "## Values",
        "",
        *values(now),
        "## Kernels",
        "",
        *kernels(now),
        "## A decoding step's attention",
        "",
        "Rows hold half of the keys to all of them; launches do not count.",
        "",
        *attention(now),
        "## Decoding",
        "",
        "32 prompts of 128 tokens, 128 new ones (32 without graphs), bfloat16.",
        "",
        *decoding(before, now),
        "## Whole PPO steps",
        "",
        "A random Llama of 1.2B parameters, 64 prompts of 64 to 128 tokens, 128 new ones, value "
        "head, one epoch, bfloat16 with float32 weights.",
        "",
        *steps(before, now),
        "## Attention",
        "",
        *facts(now),
    ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
