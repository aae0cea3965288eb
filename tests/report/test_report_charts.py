"""Parts of the report's charts: thinning, axes, notes on metrics, colours."""

from __future__ import annotations

import math
import re
from array import array
from importlib.resources import files

import metric_notes
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_fast.report import charts
from ppo_fast.report.axes import inner_range, number, short, tick_labels, ticks, widened
from ppo_fast.report.charts import Line, chart
from ppo_fast.report.courses import Course
from ppo_fast.report.groups import pictures
from ppo_fast.report.notes import healthy, note_of
from ppo_fast.report.thin import smoothed, spread, thin, thin_band
from ppo_fast.report.times import duration
from ppo_fast.runs import bounds as bounds_of
from ppo_fast.runs.health import RANGES

FINITE = st.floats(-1e90, 1e90)
CSS = files("ppo_fast.report").joinpath("page.css").read_text("utf-8")


@given(st.lists(FINITE, min_size=1, max_size=300), st.integers(4, 50))
def test_thinned_points_keep_the_extremes_and_the_ends(values, most):
    steps = [*range(1, len(values) + 1)]
    points = thin(steps, values, most)
    assert len(points) <= most
    assert {*points} <= {*zip(steps, values, strict=True)}
    assert [step for step, _ in points] == sorted(step for step, _ in points)
    kept = [value for _, value in points]
    assert (min(kept), max(kept)) == (min(values), max(values))
    assert points[0] == (1, values[0])
    assert points[-1] == (len(values), values[-1])


def test_a_thinned_band_has_means():
    band = thin_band([1, 2, 3, 4], [0, 2, 4, 6], [10, 10, 20, 20], 2)
    assert band == [(1.5, 1, 10), (3.5, 5, 20)]
    assert thin_band([1, 2], [0, 1], [2, 3], 5) == [(1, 0, 2), (2, 1, 3)]


def test_running_means_are_centred():
    values = [float(i) for i in range(100)]
    means = smoothed([*range(100)], values, 200)
    assert means[50] == (50, 50)  # a straight line stays where it is
    assert means[0] == (0, 2.5)
    jump = [0.0] * 50 + [1.0] * 50
    assert dict(smoothed([*range(100)], jump, 200))[50] == pytest.approx(6 / 11)
    assert len(smoothed([*range(1000)], [0.0] * 1000, 7)) == 7


@pytest.mark.parametrize(("count", "most"), [(1, 5), (5, 5), (100, 7)])
def test_indices_are_spread_from_the_first_to_the_last(count, most):
    found = spread(count, most)
    assert found[0] == 0
    assert found[-1] == count - 1
    assert len(found) == min(count, most)


@given(FINITE, FINITE, st.integers(2, 6))
def test_ticks_lie_in_the_range_and_read_differently(first, second, count):
    low, high = widened(min(first, second), max(first, second))
    assert low < high
    found = ticks(low, high, count)
    assert 1 <= len(found) <= 2 * count + 2
    assert all(low - 1e-6 * (high - low) <= tick <= high + 1e-6 * (high - low) for tick in found)
    assert len({*tick_labels(found)}) == len(found)


def test_tick_labels_are_short():
    assert tick_labels([0.0, 2500.0, 5000.0]) == ["0", "2500", "5000"]
    assert tick_labels([0.0, 25_000.0]) == ["0", "25k"]
    assert tick_labels([0.1, 0.30000000000000004]) == ["0.1", "0.3"]
    assert tick_labels([-1e-17, 0.5]) == ["0", "0.5"]


def test_numbers_as_text():
    assert [number(x) for x in (0.0, 0.123456, -12345.6, 1e-9)] == [
        "0", "0.1235", "-12,346", "1e-09",
    ]  # fmt: skip
    assert [short(x) for x in (0.123456, 1234.5)] == ["0.123", "1234"]
    assert [duration(x) for x in (9, 300, 6000, 90 * 3600, 72 * 3600)] == [
        "9 s", "5 min", "1 h 40 min", "3 d 18 h", "3 d 0 h",
    ]  # fmt: skip


def test_one_spike_does_not_flatten_a_chart():
    values = [0.5 + 0.01 * math.sin(i) for i in range(200)]
    assert inner_range([*values, 1000.0])[1] < 0.6
    assert inner_range(values) == (min(values), max(values))
    assert inner_range([0.0] * 199 + [1000.0]) == (0.0, 1000.0)
    made = chart("c", "t", "d.", [Line(0, raw=[*enumerate([*values, 1000.0])])])
    assert "1 values lie outside of the picture." in made


def test_a_chart_of_one_point_has_a_dot():
    made = chart("c", "t", "d", [Line(0, raw=[(7, 0.5)])])
    assert made.count("<circle") == 1
    assert "nan" not in made


def test_the_notes_are_those_of_the_documentation():
    """`python tests/helpers/metric_notes.py` updates them."""
    assert metric_notes.NOTES.read_text("utf-8") == metric_notes.text()
    assert note_of("clip_fraction").look.startswith("above 0.3: lower the learning rate")
    assert "weigh it anew" in note_of("reward/my/part/mean").look
    assert note_of("of_a_user") == ("", "")


def course_of(values):
    return Course(array("d", range(1, len(values) + 1)), array("d", values))


@pytest.mark.parametrize("one", RANGES, ids=lambda one: one.metric)
def test_bounds_are_those_that_runs_warn_of(one):
    """A course that stays just within the bounds is not warned of, one beyond them is."""
    start = 10.0
    course = course_of([start] * 20)
    bounds = healthy(one.metric, course)
    assert bounds is not None
    inside, outside = [], []
    for bound, sign in ((bounds.low, 1), (bounds.high, -1)):
        if bound is not None:
            inside.append(bound + sign * 1e-3)
            outside.append(bound if bound == 0 and one.metric != "explained_variance" else
                           bound - sign * 1e-3)  # fmt: skip
    begin = [start] * 5
    for value in inside:
        assert one.wrong(begin + [value] * 60) is None
    for value in outside:
        assert one.wrong(begin + [value] * 60) is not None
    if bounds.start > 1:
        assert bounds.start == one.steps
    assert {each.metric for each in RANGES} == {
        *bounds_of.LOWEST, *bounds_of.HIGHEST, *bounds_of.LEAST_SHARE,
    }  # fmt: skip


def test_bounds_in_words():
    course = course_of([2.0] * 20)
    found = [
        str(healthy(name, course)) for name in ("kl_sequence", "explained_variance", "entropy")
    ]
    assert found == [
        "below 50", "above 0, from step 50 on", "above 10% of where it began, from step 20 on",
    ]  # fmt: skip
    assert healthy("entropy", course).low == pytest.approx(0.2)
    assert healthy("of_a_user", course) is None


def test_metrics_of_a_band_have_no_chart_of_their_own():
    names = [
        "mean_reward", "reward_std", "reward/a/mean", "reward/a/std", "response_length",
        "response_length_p10", "response_length_p50", "response_length_p90", "ratio_mean",
        "ratio_min", "ratio_max", "ratio_p01", "ratio_p50", "ratio_p99", "value_mean", "value_min",
        "value_max", "kl_coefficient", "kl_sequence", "mine", "time/rollout", "perf/tflops",
    ]  # fmt: skip
    found = pictures(names)
    shown = {title: [one.metric for one in group] for title, group in found.items()}
    assert shown == {
        "Reward": ["mean_reward", "reward_std", "reward/a/mean"],
        "Distance from the reference": ["kl_sequence"],
        "Responses": ["response_length"],
        "Update of the policy": ["ratio_mean", "ratio_min", "ratio_max"],
        "Value function": ["value_mean"],
        "Schedules and sizes": ["kl_coefficient"],
        "Speed": ["perf/tflops"],
        "Others": ["mine"],
    }
    assert found["Update of the policy"][0][1:4] == ("ratio_p01", "ratio_p99", "ratio_p50")
    assert found["Value function"][0][1:3] == ("value_min", "value_max")
    assert found["Reward"][0].deviation == "reward_std"


def test_the_script_knows_the_charts_size():
    script = files("ppo_fast.report").joinpath("page.js").read_text("utf-8")
    size = re.search(r"LEFT = (\d+), RIGHT = (\d+), TOP = (\d+), BOTTOM = (\d+)", script)
    assert tuple(map(int, size.groups())) == (
        charts.LEFT, charts.WIDTH - charts.RIGHT, charts.TOP, charts.HEIGHT - charts.BOTTOM,
    )  # fmt: skip
    assert f"* {charts.WIDTH};" in script


def themes():
    """The colours of the light and of the dark theme, by name."""
    blocks = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    light, dark = (dict(re.findall(r"--(\w+(?:-\w+)?): (#\w{6})", block)) for block in blocks)
    assert light.keys() == dark.keys()
    return {"light": light, "dark": dark}


def contrast(first, second):
    """WCAG's ratio of two colours' luminances."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(p * w for p, w in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_have_enough_contrast(theme):
    colours = themes()[theme]
    for back in ("page", "card"):
        for ink in ("ink", "soft", "accent"):
            assert contrast(colours[ink], colours[back]) >= 4.5, (ink, back)
    assert contrast(colours["warn"], colours["warn-page"]) >= 4.5
    assert contrast(colours["ink"], colours["mark"]) >= 4.5
    for level in [f"{side}{i}" for side in "np" for i in range(1, 6)]:
        assert contrast(colours["ink"], colours[level]) >= 4.5, level
    for line in range(6):
        assert contrast(colours[f"r{line}"], colours["card"]) >= 3, line
