"""Run ops on small inputs or on the doctor's large ones, for compute-sanitizer and ncu.

python benchmarks/on_gpu/small_ops.py check [OP ...]       the cases of the check of first use
python benchmarks/on_gpu/small_ops.py examples [CASE ...]  tests/helpers/triton_cases.py
python benchmarks/on_gpu/small_ops.py big WORK             a work of the doctor, twice
"""

from __future__ import annotations

import sys

import torch
from common import note
from triton_cases import CASES

from ppo_fast.diagnostics import doctor
from ppo_fast.ops.backends import first_use

CUDA = torch.device("cuda", 0)
BIG = {
    "logprobs": doctor._logprobs_from_logits,
    "linear": doctor._linear_logprobs,
    "tokens": doctor._token_ops,
    "sample": doctor._sample_tokens,
}


def check(ops: list[str]) -> bool:
    right = True
    for op in ops or list(first_use.CHECKED):
        result = first_use.check(op, CUDA)
        note("check", op=op, ok=result.ok, error=result.error, detail=result.detail[:300])
        right &= result.ok
    return right


def examples(names: list[str]) -> bool:
    with CUDA:
        for name in names or list(CASES):
            for rows, columns, aligned in ((5, 507, False), (6, 4096, True)):
                for dtype in CASES[name].dtypes[:2]:
                    CASES[name].run(rows, columns, dtype, aligned=aligned)
    torch.cuda.synchronize()
    note("examples", cases=len(names or CASES))
    return True


def big(names: list[str]) -> bool:
    for work in BIG[names[0]](doctor.Sizes(), CUDA, "triton"):
        for _ in range(2):
            work.run()
    torch.cuda.synchronize()
    return True


if __name__ == "__main__":
    what, *names = sys.argv[1:]
    sys.exit(not {"check": check, "examples": examples, "big": big}[what](names))
