"""logprobs_from_logits: [512, 49152] float32 logits, with and without entropy and gradient."""

import eager
import pytest
import torch
from sides import TOKENS, VOCAB

from ppo_fast.ops import logprobs_from_logits


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("entropy", [True, False], ids=["entropy", "log-prob alone"])
def test_logprobs(turns, entropy, backward):
    logits = (3 * torch.randn(TOKENS, VOCAB)).requires_grad_(backward)
    labels = torch.randint(VOCAB, (TOKENS,))
    coefficients = tuple(torch.randn(2, TOKENS)[: 1 + entropy])

    def ours(impl):
        out = logprobs_from_logits(logits, labels, entropy=entropy, impl=impl)
        return tuple(out) if entropy else (out.logprobs,)

    compiled = torch.compile(ours, dynamic=False)
    outputs = {"ppo_fast": lambda: ours("cpp"), "reference": lambda: ours("reference")}
    for name, form in eager.LOGPROBS.items():
        outputs[name] = lambda form=form: form(logits, labels, entropy)
    outputs["torch.compile of the reference"] = lambda: compiled("reference")

    def with_gradient(side):
        return lambda: torch.autograd.grad(side(), logits, coefficients)

    what = "log-prob and entropy" if entropy else "log-prob alone"
    if backward:
        what += ", forward and backward into a fresh gradient"
        outputs = {name: with_gradient(side) for name, side in outputs.items()}
    turns(f"logprobs_from_logits, {what}", outputs, rounds=11)
