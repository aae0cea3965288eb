"""Metrics of a batch's responses: lengths, variety, repetition, EOS."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ppo_fast.data.tokens import Tokens

QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
REPEATED = 4  # tokens of the n-grams whose repetition is measured


def response_metrics(tokens: Tokens, eos_ids: Collection[int] = ()) -> dict[str, float]:
    """Return metrics of the responses of a batch, by token ids; one copy from the device.

    Args:
        tokens: of B sequences. All tokens of a response count, an EOS at its end too.
        eos_ids: ids of EOS; empty: unknown.

    Returns:
        response_length_p10, _p50, _p90: quantiles of the lengths, with linear interpolation.
        distinct_1, distinct_2: distinct n-grams over n-grams of all responses (Li et al. 2016,
            arXiv 1510.03055); no n-gram is of two responses.
        repetition: share of a response's 4-grams that occurred before in it, mean over the
            responses of at least 4 tokens.
        eos_share: share of responses whose last token is an EOS, with ``eos_ids``. Other stop
            tokens and stop strings do not count, as they do in ``finished_fraction``.

        Where there are no such n-grams, a metric is missing.
    """
    lengths = tokens.response_lengths
    if not len(lengths):
        return {}
    ids = tokens.response_ids.cpu()
    real = torch.arange(ids.shape[1], device="cpu") < lengths[:, None]
    shares = torch.tensor(list(QUANTILES.values()), dtype=torch.float64, device="cpu")
    found = lengths.double().quantile(shares)
    metrics = {
        f"response_length_{name}": value
        for name, value in zip(QUANTILES, found.tolist(), strict=True)
    }
    # each gram has a number below ``count``, so that those of pairs of grams fit into an int64
    single, count = _numbered(ids, real)
    pairs = single[:, :-1] * count + single[:, 1:]
    pair, pair_count = _numbered(pairs, real[:, 1:])
    for n, grams, mask in ((1, count, real), (2, pair_count, real[:, 1:])):
        if mask.any():
            metrics[f"distinct_{n}"] = grams / int(mask.sum())
    repeated = _repetition(pair, pair_count, real)
    if repeated is not None:
        metrics["repetition"] = repeated
    if eos_ids:
        last = ids.gather(1, (lengths - 1).clamp_min(0)[:, None])[:, 0]
        ends = torch.isin(last, torch.tensor(list(eos_ids), device="cpu")) & (lengths > 0)
        metrics["eos_share"] = float(ends.double().mean())
    return metrics


def _numbered(grams: Tensor, mask: Tensor) -> tuple[Tensor, int]:
    """Return each gram's number among the distinct ones, 0 outside of ``mask``, and their count."""
    distinct, numbers = torch.unique(grams[mask], return_inverse=True)
    out = torch.zeros_like(grams)
    out[mask] = numbers
    return out, len(distinct)


def _repetition(pair: Tensor, count: int, real: Tensor) -> float | None:
    """Return the mean share of repeated 4-grams; ``pair`` [B, T - 1] are the numbered 2-grams."""
    mask = real[:, REPEATED - 1 :]
    totals = mask.sum(1)
    if not totals.any():
        return None
    grams = pair[:, :-2] * count + pair[:, 2:]  # two pairs next to one another
    number, distinct = _numbered(grams, mask)
    rows = torch.arange(len(real), device="cpu")[:, None] * distinct
    first = torch.unique((rows + number)[mask])
    distinct_of_row = torch.bincount(first // distinct, minlength=len(real))
    has = totals > 0
    return float((1 - distinct_of_row[has].double() / totals[has].double()).mean())
