"""TRL's PyTorch code on the CPU against ppo_fast, in one process."""

import heads
import pytest
import torch
from memory import peak_megabytes
from sides import TOKENS, VOCAB

from ppo_fast.ops import logprobs_from_logits

pytest.importorskip("trl")

import trl_heads
from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("entropy", [True, False], ids=["entropy", "log-prob alone"])
def test_logprobs(turns, entropy, backward):
    logits = (3 * torch.randn(16, TOKENS // 16, VOCAB)).requires_grad_(backward)
    labels = torch.randint(VOCAB, logits.shape[:2])
    coefficients = tuple(torch.randn(2, *labels.shape)[: 1 + entropy])

    def ours():
        out = logprobs_from_logits(logits, labels, entropy=entropy, impl="cpp")
        return tuple(out) if entropy else (out.logprobs,)

    def by_trl():
        if entropy:
            return selective_log_softmax_and_entropy(logits, labels)
        return (selective_log_softmax(logits, labels),)

    def with_gradient(side):
        return lambda: torch.autograd.grad(side(), logits, coefficients)

    name = "selective_log_softmax_and_entropy" if entropy else "selective_log_softmax"
    sides = {"ppo_fast": ours, f"TRL, {name}": by_trl}
    what = "log-prob and entropy" if entropy else "log-prob alone"
    if backward:
        what += ", forward and backward into a fresh gradient"
        sides = {name: with_gradient(side) for name, side in sides.items()}
    turns(f"logprobs_from_logits, {what}", sides, rounds=11)


@pytest.mark.parametrize("entropy", [True, False], ids=["entropy", "log-prob alone"])
@pytest.mark.parametrize("head", ["trained head", "frozen head"])
def test_linear_logprobs(turns, head, entropy):
    work = heads.make_work(frozen=head == "frozen head")
    sides = {
        name: lambda form=form: heads.gradients(form(work, entropy), work)
        for name, form in trl_heads.HEADS.items()
    }
    what = "with entropy" if entropy else "log-prob alone"
    turns(f"linear_logprobs, forward and backward, {what}, {head}", sides, rounds=5)


def test_memory(benchmark, show):
    megabytes = {}

    def weigh():
        for name in (heads.RECOMPUTED, heads.KEPT, *trl_heads.TRL):
            megabytes[name] = peak_megabytes("trl_heads", name, True)

    benchmark.group = "memory"
    benchmark.pedantic(weigh)
    work = "linear_logprobs, with entropy, trained head: peak memory beyond the gradients"
    benchmark.extra_info |= {"work": work, "unit": "MB", "sides": megabytes}
    show(decimals=1)
