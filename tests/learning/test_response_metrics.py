"""Metrics of responses, against values by hand and loops over lists."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from ppo_fast.data.tokens import make_tokens
from ppo_fast.learning.ratio_quantiles import ratio_quantiles
from ppo_fast.learning.response_metrics import response_metrics


def tokens(*responses: list[int], pad_id: int = 0):
    return make_tokens([[1, 2]] * len(responses), responses, pad_id, torch.device("cpu"))


def test_values_by_hand():
    found = response_metrics(tokens([5, 6, 5, 6, 5, 6, 5], [5, 6], [7, 9, 7, 9, 8]), {8, 5})
    # 14 tokens, 5 of them distinct; 6 + 1 + 4 pairs, distinct: 56 65 79 97 98
    assert found["distinct_1"] == 5 / 14
    assert found["distinct_2"] == 5 / 11
    # of the 4-grams 5656 6565 5656 6565 two are repeated; 7979 9798: none; the second has none
    assert found["repetition"] == pytest.approx((2 / 4 + 0) / 2)
    assert found["eos_share"] == pytest.approx(2 / 3)
    assert found["response_length_p10"] == pytest.approx(2 + 0.2 * 3)
    assert found["response_length_p50"] == 5
    assert found["response_length_p90"] == pytest.approx(5 + 0.8 * 2)


def test_padding_and_other_responses_add_no_ngrams():
    one = response_metrics(tokens([3, 3, 3, 3, 3], [4]))
    assert one["distinct_1"] == 2 / 6
    assert one["distinct_2"] == 1 / 4
    assert one["repetition"] == 1 / 2
    for pad_id in (3, 4, 77):
        assert response_metrics(tokens([3, 3, 3, 3, 3], [4], pad_id=pad_id)) == one


def test_what_is_unknown_is_missing():
    found = response_metrics(tokens([4], [4]))
    assert found["distinct_1"] == 0.5
    assert not {"distinct_2", "repetition", "eos_share"} & found.keys()
    assert response_metrics(tokens([4, 5], [6, 7]), {4})["eos_share"] == 0


def test_large_ids_and_batches_agree_with_loops():
    g = torch.Generator().manual_seed(1)
    rows = [
        (torch.randint(0, 9, (n,), generator=g) * 10_000_019).tolist()
        for n in torch.randint(1, 60, (40,), generator=g).tolist()
    ]
    found = response_metrics(tokens(*rows), {10_000_019})
    pairs = [pair for row in rows for pair in pairwise(row)]
    shares = []
    for row in rows:
        grams = [tuple(row[i : i + 4]) for i in range(len(row) - 3)]
        shares += [1 - len(set(grams)) / len(grams)] if grams else []
    assert found["distinct_2"] == len(set(pairs)) / len(pairs)
    assert found["repetition"] == pytest.approx(sum(shares) / len(shares))
    ends = [row[-1] == 10_000_019 for row in rows]
    assert found["eos_share"] == pytest.approx(sum(ends) / len(ends))


def test_quantiles_of_ratios_are_torchs_over_counted_tokens():
    g = torch.Generator().manual_seed(2)
    parts = [torch.randn(3, 5, generator=g), torch.randn(2, 7, generator=g)]
    masks = [torch.rand(part.shape, generator=g) < 0.7 for part in parts]
    counted = torch.cat([p[m] for p, m in zip(parts, masks, strict=True)]).double().exp()
    for part, mask, garbage in zip(parts, masks, (math.nan, -50.0), strict=True):
        part[~mask] = garbage
    found = ratio_quantiles(parts, masks)
    for name, share in {"ratio_p01": 0.01, "ratio_p50": 0.5, "ratio_p99": 0.99}.items():
        assert found[name] == pytest.approx(float(counted.quantile(share)), rel=1e-6)


def test_quantiles_of_few_or_huge_ratios():
    one = torch.tensor([[math.log(3.0), 500.0]])
    found = ratio_quantiles([one], [torch.tensor([[True, False]])])
    assert found == pytest.approx({"ratio_p01": 3.0, "ratio_p50": 3.0, "ratio_p99": 3.0})
    assert ratio_quantiles([one], [torch.zeros(1, 2, dtype=torch.bool)]) == {}
    assert ratio_quantiles([], []) == {}
    assert ratio_quantiles([one], [torch.ones(1, 2, dtype=torch.bool)])["ratio_p99"] < 3.5e38
