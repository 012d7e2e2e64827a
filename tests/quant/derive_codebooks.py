"""The AF4 and BOF4 tables of quant/codebook.py from their definitions; run as a script, it prints them.

A block of `n` normal weights is divided by its largest magnitude m. Given m, the others are normal and cut off at m;
m itself has the density of the largest of n. So both tables are the ends of fixed-point iterations over integrals.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

CELLS = 2**14
POINTS = 1500
LARGEST = 12.0
"""Magnitudes beyond do not occur: a normal weight exceeds it once in 1e32."""


class Law:
    """x = |weight| / m over (0, 1), each weight counted m**power times: sums up to x, of the counts and of x."""

    def __init__(self, blocksize: int, power: int) -> None:
        m = torch.linspace(LARGEST / POINTS, LARGEST, POINTS, dtype=torch.float64)
        inside = torch.erf(m / math.sqrt(2))
        largest = blocksize * inside ** (blocksize - 1) * 2 * _normal(m)
        x = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS
        each = largest * m**power * m / inside
        density = torch.cat([_normal(part[:, None] * m) @ each for part in x.split(1024)])
        start = torch.zeros(1, dtype=torch.float64)
        self.counts, self.sums = (torch.cat([start, part.cumsum(0)]) for part in (density, density * x))

    def below(self, sums: Tensor, x: Tensor) -> Tensor:
        place = x * CELLS
        cell = place.long().clamp(max=CELLS - 1)
        return sums[cell] + (sums[cell + 1] - sums[cell]) * (place - cell)

    def means(self, bounds: Tensor) -> Tensor:
        """Of x between neighbouring bounds."""
        return self.below(self.sums, bounds).diff() / self.below(self.counts, bounds).diff()

    def medians(self, bounds: Tensor) -> Tensor:
        found = self.below(self.counts, bounds)
        half = (found[1:] + found[:-1]) / 2
        cell = torch.searchsorted(self.counts, half).clamp(1, CELLS) - 1
        return (cell + (half - self.counts[cell]) / (self.counts[cell + 1] - self.counts[cell])) / CELLS


def _normal(x: Tensor) -> Tensor:
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _settled(levels: Tensor, better: Callable[[Tensor], Tensor]) -> Tensor:
    for _ in range(5000):
        levels, before = better(levels), levels
        if float((levels - before).abs().max()) < 1e-12:
            break
    return levels


def _between(inner: Tensor, *, zero: bool = True, one: bool = True) -> Tensor:
    """Midpoints of 0, `inner` and 1; without `zero` (`one`) the first (last) cell ends at 0 (1) itself."""
    ends = inner.new_zeros(1), inner.new_ones(1)
    levels = torch.cat([ends[0][: int(zero)], inner, ends[1][: int(one)]])
    middle = (levels[1:] + levels[:-1]) / 2
    return torch.cat([ends[0][: int(not zero)], middle, ends[1][: int(not one)]])


def af4(blocksize: int) -> Tensor:
    """arXiv 2306.06965: each level the median of its cell, so that the mean |error| is least; 0 is put between."""
    law = _law(blocksize, 0)

    def half(free: int) -> Tensor:
        return _settled(_spread(free), lambda levels: law.medians(_between(levels, zero=False)))

    return _table(half(6), half(7))


@cache
def _law(blocksize: int, power: int) -> Law:
    return Law(blocksize, power)


def bof4(blocksize: int, *, signed: bool = False) -> Tensor:
    """arXiv 2505.06653: each level the mean of its cell, weighted with m**2, so that the squared error is least.

    0 and ±1 are fixed; `signed`, BOF4-S, divides by m with its sign, so that -1 does not occur and is free.
    """
    law = _law(blocksize, 2)

    def half(free: int, *, one: bool = True) -> Tensor:
        return _settled(_spread(free), lambda levels: law.means(_between(levels, one=one)))

    return _table(half(7, one=False) if signed else half(6), half(7), open_end=signed)


def _spread(free: int) -> Tensor:
    return torch.arange(1, free + 1, dtype=torch.float64) / (free + 1)


def _table(below: Tensor, above: Tensor, *, open_end: bool = False) -> Tensor:
    one = below.new_ones(1)
    return torch.cat([-one[: int(not open_end)], -below.flip(0), one * 0, above, one])


if __name__ == "__main__":
    for name, derive in (("AF4", af4), ("BOF4", bof4), ("BOF4_S", lambda size: bof4(size, signed=True))):
        print(f"{name} = {{")  # noqa: T201
        for power in range(5, 13):
            numbers = ", ".join(f"{value:.8g}" for value in derive(2**power).tolist())
            print(f"    {2**power}: ({numbers}),")  # noqa: T201
        print("}")  # noqa: T201
