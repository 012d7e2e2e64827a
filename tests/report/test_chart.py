"""Curves: every value where the axes say it is, and none that cannot be drawn."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from halfbyte.report.chart import MOST_POINTS, Level, Line, chart, highest, smoothed, thinned, ticks


def places(svg: str) -> list[list[tuple[float, float]]]:
    """The polylines' points."""
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in points.split())]
        for points in re.findall(r'points="([^"]*)"', svg)
    ]


def labels(svg: str, anchor: str) -> list[tuple[float, float, float]]:
    """(x, y, value) of an axis's labels."""
    found = re.findall(rf"<text x=([\d.]+) y=([\d.]+) text-anchor={anchor}>([-\d.]+)<", svg)
    return [(float(x), float(y), float(value)) for x, y, value in found]


def test_points_lie_where_the_axes_say() -> None:
    (curve,) = places(chart("loss", [Line("", [(0, 1.0), (5, 3.0), (10, 2.0)])], x="step"))
    svg = chart("loss", [Line("", [(0, 1.0), (5, 3.0), (10, 2.0)])], x="step")
    heights = {value: y - 4 for _, y, value in labels(svg, "end")}
    across = {value: x for x, _, value in labels(svg, "middle")}
    assert heights[2.0] == pytest.approx(curve[2][1], abs=0.2)
    assert heights[3.0] == pytest.approx(curve[1][1], abs=0.2)
    assert across[10] == pytest.approx(curve[2][0], abs=0.2)


@pytest.mark.parametrize(
    "values", [[5.0], [2.0, 2.0], [0.0, 0.0], [1e-9, 2e-9], [-3.0, 1e6], [1.0, math.nan, math.inf]]
)
def test_any_values_make_a_picture(values: list[float]) -> None:
    svg = chart("x < y & z", [Line("a<b", list(enumerate(values)), look="dots")], x="step", levels=[Level("l", 1.0)])
    assert "x &lt; y &amp; z" in svg
    assert "nan" not in svg
    assert all(0 <= x <= 520 and 0 <= y <= 250 for line in places(svg) for x, y in line)


def test_nothing_to_draw_is_no_picture() -> None:
    assert chart("loss", [Line("a", []), Line("b", [(1, math.nan)])], x="step") == ""


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.13, 0.19), (0, 123456789), (-5, 5), (2.9995, 3.0001)])
def test_ticks_are_few_and_within(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)


def test_thinning_keeps_mean_and_peak() -> None:
    points = [(float(i), float(i % 7)) for i in range(10 * MOST_POINTS)]
    few = thinned(points)
    assert len(few) == MOST_POINTS
    assert sum(y for _, y in few) / len(few) == pytest.approx(sum(y for _, y in points) / len(points))
    assert max(y for _, y in thinned([*points, (9e9, 99.0)], highest)) == 99.0
    assert thinned(points[:5]) == points[:5]


def test_smoothing_has_no_bias_towards_the_first() -> None:
    assert smoothed([(1, 4.0), (2, 4.0)]) == [(1, pytest.approx(4.0)), (2, pytest.approx(4.0))]
    assert smoothed([(1, 4.0), (2, 2.0)], 0.5)[1][1] == pytest.approx((0.25 * 4 + 0.5 * 2) / 0.75)


def test_xml() -> None:
    """What a browser forgives, a reader of the page need not: pictures are XML but for unquoted attributes."""
    svg = chart("t", [Line("a", [(0, 1), (1, 2)])], x="s").partition("<svg")[2].partition("</figure>")[0]
    ElementTree.fromstring("<svg" + re.sub(r"=([^\s\"'>/]+)", r'="\1"', svg))
