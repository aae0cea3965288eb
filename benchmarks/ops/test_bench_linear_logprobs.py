"""linear_logprobs forward and backward: 512 tokens, head [49152, 576], float32."""

from functools import partial

import heads
import pytest
import torch
from sides import TOKENS

BEST = "eager, log_softmax and gather"


def time_forms(turns, what, work, forms, *, entropy=True, rounds=3):
    """Time forward and backward of form(work, entropy)."""
    sides = {
        name: lambda form=form: heads.gradients(form(work, entropy), work)
        for name, form in forms.items()
    }
    turns(f"linear_logprobs, forward and backward, {what}", sides, rounds=rounds)


@pytest.mark.parametrize("head", ["trained head", "frozen head"])
def test_with_entropy(turns, head):
    compiled = torch.compile(partial(heads.ours, impl="reference"))
    forms = heads.OURS | heads.EAGER | {"torch.compile of the reference": compiled}
    work = heads.make_work(frozen=head == "frozen head")
    time_forms(turns, f"with entropy, {head}", work, forms)


def test_logprob_alone(turns):
    work = heads.make_work()
    forms = {name: form for name, form in heads.HEADS.items() if "auto chunks" not in name}
    time_forms(turns, "log-prob alone, trained head", work, forms, entropy=False, rounds=3)


def test_masked(turns):
    """Three rows in four are masked."""
    work = heads.make_work()
    mask = torch.zeros(TOKENS, dtype=torch.bool)
    mask[torch.randperm(TOKENS)[: TOKENS // 4]] = True

    def masked_after(work, entropy):
        return tuple(x.where(mask, 0.0) for x in heads.EAGER[BEST](work, entropy))

    def picked_before(work, entropy):
        kept = work._replace(hidden=work.hidden[mask], labels=work.labels[mask])
        outputs = heads.EAGER[BEST](kept, entropy)
        return tuple(x.new_zeros(TOKENS).masked_scatter(mask, x) for x in outputs)

    forms = {name: partial(ours, mask=mask) for name, ours in heads.OURS.items()}
    forms[f"{BEST}, masked afterwards"] = masked_after
    forms[f"{BEST}, of hidden[mask]"] = picked_before
    time_forms(turns, "with entropy, 75% of the rows masked", work, forms)


def test_zero_coefficients(turns):
    """Three rows in four get no gradient, as clipped tokens do."""
    work = heads.make_work()
    work.coefficients[:, torch.randperm(TOKENS)[TOKENS // 4 :]] = 0.0
    forms = {
        f"{name}, drop_zero_rows": partial(ours, drop_zero_rows=True)
        for name, ours in heads.OURS.items()
    }
    forms[BEST] = heads.EAGER[BEST]
    time_forms(turns, "with entropy, 75% of the coefficients 0", work, forms)
