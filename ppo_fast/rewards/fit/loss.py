"""Loss and metrics of preference pairs, from the rewards of their two responses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

BINS = 10


def pair_losses(
    chosen: Tensor, rejected: Tensor, margins: Tensor | None = None, centering: float = 0.0
) -> Tensor:
    """Compute the loss of each pair.

    -log sigmoid(r_chosen - r_rejected - margin) + centering * (r_chosen + r_rejected)^2: the
    Bradley-Terry model (Ouyang et al. 2022, equation 1), with the margin of Touvron et al. 2023,
    equation 2, and the regularisation of Eisenstein et al. 2023.

    Args:
        chosen, rejected: rewards [n].
        margins: [n]; None: 0.

    Returns:
        [n], of the rewards' dtype.
    """
    difference = chosen - rejected
    losses = -logsigmoid(difference if margins is None else difference - margins)
    return losses + centering * (chosen + rejected).square() if centering else losses


def pair_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """Compute metrics of rewards [n] and [n]: plain floats.

    accuracy is the share of pairs whose chosen response has the higher reward (of equal rewards
    none is higher), margin the mean difference; reward_mean and reward_std are over both responses.
    """
    difference, rewards = chosen - rejected, torch.cat([chosen, rejected])
    return {
        "accuracy": float((difference > 0).double().mean()),
        "margin": float(difference.mean()),
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std(correction=0)),
    }


def calibration(chosen: Tensor, rejected: Tensor) -> float:
    """Compute the expected calibration error of the probabilities that the rewards state.

    Of each pair, the response with the higher reward is predicted, with the confidence
    sigmoid(|r_chosen - r_rejected|); equal rewards predict either with 1/2, and are right by 1/2.
    The error is sum over bins of |B|/n |acc(B) - conf(B)|, with
    10 bins of equal width over (0, 1] (Guo et al. 2017, equation 3); 0 is best.

    Args:
        chosen, rejected: rewards [n].
    """
    difference = (chosen - rejected).double()
    confidence, right = difference.abs().sigmoid(), (difference.sign() + 1) / 2
    bins = (confidence * BINS).ceil().long() - 1
    gaps = difference.new_zeros(BINS).index_add_(0, bins, right - confidence)
    return float(gaps.abs().sum() / len(difference))
