"""The figures of docs/qlora.md: python scripts/figures.py draws docs/nf4.svg and docs/layer.svg again."""

from __future__ import annotations

import itertools
from math import exp, pi, sqrt
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from halfbyte.quant.codebook import NF4

DOCS = Path(__file__).parent.parent / "docs"
INK, FROZEN, TRAINED, PAPER = "#37474f", "#b2dfdb", "#ffcc80", "#fafafa"
SIGMA = 1 / 2.6
"""Of a normal law of whose 64 draws the largest magnitude is 1 in the mean."""


def draw_codebook(axes: Axes) -> None:
    """A normal density, and where NF4's values stand under it."""
    xs = [x / 200 for x in range(-220, 221)]
    density = [exp(-((x / SIGMA) ** 2) / 2) / (SIGMA * sqrt(2 * pi)) for x in xs]
    axes.fill_between(xs, density, color=FROZEN, lw=0)
    axes.vlines(NF4, 0, 0.12, color=INK, lw=2)
    for code, value in enumerate(NF4):
        axes.text(value, -0.09 - 0.1 * (code % 2), str(code), ha="center", va="center", fontsize=8, color=INK)
    borders = [(a + b) / 2 for a, b in itertools.pairwise(NF4)]
    axes.vlines(borders, 0, 1.1, color="white", lw=0.8)
    axes.set_title(
        "a weight / the largest of its 64: the 16 values, and what is rounded to each", fontsize=9, color=INK
    )
    axes.set(xlim=(-1.1, 1.1), ylim=(-0.3, 1.1), xticks=[-1, -0.5, 0, 0.5, 1], yticks=[])
    axes.spines[["left", "right", "top"]].set_visible(False)


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    """A filled box with centred text."""
    axes.add_patch(
        mpl.patches.FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02", fc=color, ec=INK, lw=1)
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.5, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    """An arrow, and what it says."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": INK, "lw": 1.2})
    axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.12, text, ha="center", fontsize=8, color=INK)


def draw_layer(axes: Axes) -> None:
    """Bytes to a tile to a product; the adapter beside it."""
    box(axes, 0.0, 1.55, 2.1, 0.9, "codes, 4 bits each\nscales, 8 bits for 64", FROZEN)
    box(axes, 3.2, 1.55, 2.0, 0.9, "a tile of W, decoded\nin the cache, dropped", FROZEN)
    box(axes, 6.3, 1.55, 1.3, 0.9, "W x", FROZEN)
    box(axes, 3.2, 0.2, 2.0, 0.7, "A, then B (float32)", TRAINED)
    box(axes, 6.3, 0.2, 1.3, 0.7, "(α/r) B A x", TRAINED)
    box(axes, 0.0, 0.2, 2.1, 0.7, "x: the layer's input", PAPER)
    box(axes, 8.6, 0.85, 0.7, 0.8, "y", PAPER)
    arrow(axes, (2.15, 2.0), (3.15, 2.0), "decode")
    arrow(axes, (5.25, 2.0), (6.25, 2.0), "multiply")
    arrow(axes, (2.15, 0.55), (3.15, 0.55))
    arrow(axes, (5.25, 0.55), (6.25, 0.55))
    arrow(axes, (2.15, 0.85), (6.25, 1.7))
    arrow(axes, (7.65, 1.95), (8.55, 1.4))
    arrow(axes, (7.65, 0.55), (8.55, 1.1), "+")
    axes.set(xlim=(-0.15, 9.45), ylim=(0, 2.7))
    axes.axis("off")


def main() -> None:
    """Draw both."""
    mpl.rcParams.update({"svg.hashsalt": "halfbyte", "svg.fonttype": "path"})
    for name, draw, height in (("nf4", draw_codebook, 2.6), ("layer", draw_layer, 2.5)):
        figure = Figure(figsize=(8, height), layout="constrained", facecolor="white")
        draw(figure.add_subplot())
        figure.savefig(DOCS / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
