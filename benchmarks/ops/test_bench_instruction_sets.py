"""The C++ kernels of each instruction set of this processor, on the same work.

Ours come first: those that run unless another set is asked for.
"""

from functools import partial

import pytest
import torch
from sides import HIDDEN, TOKENS, VOCAB

from ppo_fast.ops import _C, few_row_linear, logprobs_from_logits

# Those of plain x86-64 take several times as long.
SETS = [name for name in _C.instruction_sets() if name != "baseline"]


def sides(call):
    """Return ``call`` with the kernels of each instruction set."""

    def with_kernels(name):
        default = _C.instruction_set()
        _C.use_instruction_set(name)
        try:
            return call()
        finally:
            _C.use_instruction_set(default)

    first, *others = SETS
    named = {f"ppo_fast, {first}": first} | {f"kernels of {name}": name for name in others}
    return {words: partial(with_kernels, name) for words, name in named.items()}


@pytest.mark.parametrize("entropy", [False, True], ids=["log-probs", "and entropy"])
def test_logprobs(turns, entropy):
    logits, labels = torch.randn(TOKENS, VOCAB), torch.randint(VOCAB, (TOKENS,))
    work = f"instruction sets: logprobs_from_logits{', with entropy' if entropy else ''}, forward"
    turns(work, sides(lambda: logprobs_from_logits(logits, labels, entropy=entropy)), rounds=15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 32])
def test_few_row_linear(turns, rows, dtype):
    x, weight = torch.randn(rows, HIDDEN), torch.randn(VOCAB, HIDDEN).to(dtype)
    words = str(dtype).removeprefix("torch.")
    work = f"instruction sets: few_row_linear, {rows} rows, weight in {words}"
    turns(work, sides(lambda: few_row_linear(x, weight)), rounds=15)
