"""Means of few seeds with their 95 % confidence intervals, and which differences are real; pure Python."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean and half the width of its confidence interval; None where one value says nothing of the spread."""

    value: float
    half_width: float | None

    @property
    def real(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.half_width is not None and abs(self.value) > self.half_width


def mean(values: Sequence[float]) -> Mean:
    """Student's interval for the mean of a normal law of which `values` (one at least) are a sample."""
    center = statistics.fmean(values)
    if len(values) < 2:
        return Mean(center, None)
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return Mean(center, student_quantile(0.5 + CONFIDENCE / 2, len(values) - 1) * spread)


def difference(ours: dict[int, float], reference: dict[int, float]) -> Mean | None:
    """Mean of ours - reference over the seeds that both have: paired, so what a seed does to both cancels."""
    both = sorted(ours.keys() & reference.keys())
    return mean([ours[seed] - reference[seed] for seed in both]) if both else None


def student_quantile(probability: float, freedom: int) -> float:
    """The t that Student's variable with `freedom` degrees of freedom stays below with `probability` > 0.5."""
    low, high = 0.0, 1.0
    while _below(high, freedom) < probability:
        low, high = high, high * 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _below(middle, freedom) < probability else (low, middle)
    return high


def _below(t: float, freedom: int) -> float:
    """P(T < t), t >= 0: with t = sqrt(freedom) tan(angle) the density is cos(angle)^(freedom - 1); Simpson's rule."""
    angle, steps = math.atan(t / math.sqrt(freedom)), 400
    width = angle / steps
    heights = [math.cos(width * i) ** (freedom - 1) for i in range(steps + 1)]
    area = (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])) * width / 3
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return 0.5 + scale * area
