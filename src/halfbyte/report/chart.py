"""Curves as SVG, drawn here: a few kilobytes each, in the page's own colours, legible where it is dark or narrow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 34
LEAST_MARK = 3
"""Between two marks that are both drawn."""
MOST_POINTS = 400
"""Of a line: as fine as a screen shows."""


@dataclass(frozen=True)
class Line:
    """A curve through `points`; `colour` is a number of the page's palette.

    Attributes:
        look: "" a line, "thin" a faint one behind others, "dots" a line with its points shown.
    """

    name: str
    points: Points
    colour: int = 0
    look: str = ""


@dataclass(frozen=True)
class Level:
    """A dashed line across."""

    name: str
    value: float
    colour: int = 1


def thinned(points: Points, pick: Callable[[Points], tuple[float, float]] | None = None) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` of `points`, each for a run of neighbours: their mean, or what `pick` makes of them."""
    pick = pick or mean_point
    size = max(math.ceil(len(points) / MOST_POINTS), 1)
    return [pick(points[i : i + size]) for i in range(0, len(points), size)] if size > 1 else list(points)


def mean_point(points: Points) -> tuple[float, float]:
    """Mean of both."""
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def highest(points: Points) -> tuple[float, float]:
    """The point that lies highest."""
    return max(points, key=lambda point: point[1])


def smoothed(points: Points, weight: float = 0.9) -> list[tuple[float, float]]:
    """Exponential moving average without bias towards the first value."""
    result, average, norm = [], 0.0, 0.0
    for x, value in points:
        average, norm = weight * average + (1 - weight) * value, weight * norm + (1 - weight)
        result.append((x, average / norm))
    return result


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between `low` and `high`, at most `most`."""
    span = max(high - low, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(step for step in (power, 2 * power, 2.5 * power, 5 * power, 10 * power) if span / step <= most)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(
    title: str, lines: Sequence[Line], *, x: str, levels: Sequence[Level] = (), marks: Points = (),
    mark_names: Sequence[str] = (), zero: bool = False, shown: Callable[[float], str] = "{:g}".format,
) -> str:  # fmt: skip
    """A figure of `lines`; empty where none has a point.

    Args:
        x: what is counted across.
        marks: (x, 0) of moments with names, drawn as upright lines.
        zero: the axis begins at 0.
        shown: a value of the axis as text.
    """
    finite = [
        Line(line.name, [p for p in line.points if math.isfinite(p[1])], line.colour, line.look) for line in lines
    ]
    drawn = [line for line in finite if line.points]
    if not drawn:
        return ""
    xs = [point[0] for line in drawn for point in line.points]
    ys = [point[1] for line in drawn for point in line.points] + [level.value for level in levels]
    plane = _Plane(min(xs), max(xs), 0.0 if zero else min(ys), max(ys))
    parts = [_axes(plane, x, shown)]
    parts += [_mark(plane, at[0], name, end) for at, name, end in _labelled(marks, mark_names, plane)]
    for level in levels:
        across = f"M{LEFT} {plane.y(level.value):.1f}H{WIDTH - RIGHT}"
        parts.append(f'<path class=level style="stroke:var(--c{level.colour})" d="{across}"/>')
    parts += [_curve(plane, line) for line in drawn]
    named = [(line.name, line.colour, "solid") for line in drawn if line.name]
    named += [(level.name, level.colour, "dashed") for level in levels]
    legend = "".join(
        f'<span><i style="border-color:var(--c{colour});border-top-style:{style}"></i>{escape(name)}</span>'
        for name, colour, style in named
    )
    return (
        f"<figure><figcaption>{escape(title)}{legend}</figcaption>"
        f'<svg class=chart viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{escape(title)}">{"".join(parts)}</svg>'
        "</figure>"
    )


class _Plane:
    """From values to places; a little air above and below, and something to see where all values are equal."""

    def __init__(self, left: float, right: float, low: float, high: float) -> None:
        air = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
        self.left, self.right = left, right if right > left else left + 1
        self.low, self.high = (low if low == 0 else low - air), high + air

    def x(self, value: float) -> float:
        return LEFT + (value - self.left) / (self.right - self.left) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)


def _axes(plane: _Plane, name: str, shown: Callable[[float], str]) -> str:
    parts = []
    for value in ticks(plane.low, plane.high, 5):
        at = plane.y(value)
        parts.append(f'<path class=axis d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f"<text x={LEFT - 6} y={at + 4:.1f} text-anchor=end>{escape(shown(value))}</text>")
    whole = all(value == int(value) for value in (plane.left, plane.right))  # steps: there is nothing between them
    for value in ticks(plane.left, plane.right):
        if whole and value != int(value):
            continue
        parts.append(f"<text x={plane.x(value):.1f} y={HEIGHT - BOTTOM + 16} text-anchor=middle>{value:g}</text>")
    return "".join(parts) + f"<text x={WIDTH - RIGHT} y={HEIGHT - 3} text-anchor=end>{escape(name)}</text>"


def _labelled(marks: Points, names: Sequence[str], plane: _Plane) -> list[tuple[tuple[float, float], str, float]]:
    """Marks with their names where there is room for them up to the next one."""
    if not marks:
        return []
    ends = [*(plane.x(mark[0]) for mark in marks[1:]), WIDTH - RIGHT]
    rows = [row for row in zip(marks, names, ends, strict=True) if row[2] - plane.x(row[0][0]) > LEAST_MARK]
    return [(mark, name if end - plane.x(mark[0]) > 6.5 * len(name) else "", end) for mark, name, end in rows]


def _mark(plane: _Plane, at: float, name: str, end: float) -> str:
    x = max(plane.x(at), LEFT)
    line = f'<path class=mark d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
    return line + (f"<text x={x + 3:.1f} y={HEIGHT - BOTTOM - 5}>{escape(name)}</text>" if name else "")


def _curve(plane: _Plane, line: Line) -> str:
    places = [(plane.x(x), plane.y(y)) for x, y in line.points]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    style = f'style="stroke:var(--c{line.colour})"'
    kind = "thin" if line.look == "thin" else "line"
    curve = f'<polyline class={kind} {style} points="{points}"/>'
    if line.look == "dots" or len(places) == 1:
        curve += "".join(f'<circle cx={x:.1f} cy={y:.1f} r=3.5 fill="var(--c{line.colour})"/>' for x, y in places)
    return curve
