"""Fewer points for a picture, with each stretch's lowest and highest; running means."""

from __future__ import annotations

from collections.abc import Sequence

Points = list[tuple[float, float]]


def thin(steps: Sequence[float], values: Sequence[float], most: int) -> Points:
    """Return at most ``most`` of the points (step, value), by rising step.

    Of each of ``most`` // 2 stretches of equally many points, the lowest and the highest stay. The
    first and the last point stay, if ``most`` is 4 at least.
    """
    count = len(steps)
    if count <= most:
        return [*zip(steps, values, strict=True)]
    stretches = max(most // 2 - 1, 1)
    kept = {0, count - 1}
    for i in range(stretches):
        inside = range(i * count // stretches, (i + 1) * count // stretches)
        kept |= {min(inside, key=values.__getitem__), max(inside, key=values.__getitem__)}
    return [(steps[i], values[i]) for i in sorted(kept)]


def thin_band(
    steps: Sequence[float], lows: Sequence[float], highs: Sequence[float], most: int
) -> list[tuple[float, float, float]]:
    """Return at most ``most`` of the points (step, low, high).

    A stretch of several points becomes one at its middle, with the mean of its lows and of its
    highs: a band shows how far values spread as a rule.
    """
    count = len(steps)
    stretches = min(count, most)
    found = []
    for i in range(stretches):
        inside = slice(i * count // stretches, (i + 1) * count // stretches)
        size = inside.stop - inside.start
        found.append(
            (sum(steps[inside]) / size, sum(lows[inside]) / size, sum(highs[inside]) / size)
        )
    return found


def smoothed(steps: Sequence[float], values: Sequence[float], most: int) -> Points:
    """Return running means (step, mean) at no more than ``most`` of the steps.

    They are over a tenth of the values, at least 5, and near the ends over those that there are.
    They are centred: they do not lag behind.
    """
    count = len(steps)
    half = max(count // 20, 2)
    found = []
    for i in spread(count, most):
        near = values[max(i - half, 0) : i + half + 1]
        found.append((steps[i], sum(near) / len(near)))
    return found


def spread(count: int, most: int) -> list[int]:
    """Return indices below ``count`` at equal distances, with the first and the last."""
    if count <= most:
        return [*range(count)]
    return [i * (count - 1) // (most - 1) for i in range(most)]
