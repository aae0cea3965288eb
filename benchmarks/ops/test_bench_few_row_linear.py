"""few_row_linear: the head's product of a decoding step, against two products of the BLAS."""

import pytest
import torch
import torch.nn.functional as F
from sides import HIDDEN, VOCAB

from ppo_fast.ops import few_row_linear, quantize_rows


@pytest.mark.parametrize("rows", [1, 4, 8, 16, 32, 64, 128])
def test_few_row_linear(turns, rows):
    x, weight = torch.randn(rows, HIDDEN), torch.randn(VOCAB, HIDDEN)
    half, (numbers, scale) = weight.bfloat16(), quantize_rows(weight)
    sides = {
        "ppo_fast": lambda: few_row_linear(x, weight),
        "ppo_fast, weight in bfloat16": lambda: few_row_linear(x, half),
        "ppo_fast, weight in int8": lambda: few_row_linear(x, numbers, scale=scale),
        "F.linear": lambda: F.linear(x, weight),
        "the transposed product": lambda: few_row_linear(x, weight, impl="reference"),
    }
    turns(f"few_row_linear, {rows} rows", sides, rounds=15)
