"""sample_tokens: a token a row of [B, 49152] float32 logits, with its log-prob."""

import eager
import pytest
import torch
from sides import VOCAB

from ppo_fast.ops import sample_tokens


def logits_of(rows: int, kind: str) -> torch.Tensor:
    """Return logits of deviation 3; "peaked": ten tokens a row have nearly all the mass."""
    logits = 3 * torch.randn(rows, VOCAB)
    if kind == "peaked":
        logits.scatter_add_(1, torch.randint(VOCAB, (rows, 10)), 15 + torch.randn(rows, 10))
    return logits


@pytest.mark.parametrize(
    ("rows", "kind"), [(8, "flat"), (8, "peaked"), (1, "peaked"), (32, "peaked")]
)
def test_whole_distribution(turns, rows, kind):
    logits = logits_of(rows, kind)
    seeds, positions = torch.arange(rows), torch.full((rows,), 7)

    def ours(impl):
        return sample_tokens(logits, seeds, positions, impl=impl)

    sides = {"ppo_fast": lambda: ours("cpp")}
    for name, form in eager.SAMPLE.items():
        sides[name] = lambda form=form: form(logits)
    sides["reference"] = lambda: ours("reference")
    turns(f"sample_tokens, {rows} rows, {kind}", sides, rounds=40)


@pytest.mark.parametrize("kind", ["flat", "peaked"])
@pytest.mark.parametrize("truncation", [{"top_k": 50}, {"top_p": 0.9}], ids=["top_k", "top_p"])
def test_truncated(turns, kind, truncation):
    logits = logits_of(8, kind)
    seeds, positions = torch.arange(8), torch.full((8,), 7)

    def ours(impl):
        return sample_tokens(logits, seeds, positions, **truncation, impl=impl)

    def by_hand():
        if "top_k" in truncation:
            return eager.top_k_by_multinomial(logits, truncation["top_k"])
        return eager.top_p_by_multinomial(logits, truncation["top_p"])

    sides = {
        "ppo_fast": lambda: ours("cpp"),
        "reference": lambda: ours("reference"),
        "topk or sort, softmax, torch.multinomial": by_hand,
    }
    ((name, number),) = truncation.items()
    turns(f"sample_tokens, 8 rows, {kind}, {name}={number}", sides, rounds=20)
