"""The page's pictures, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from halfbyte.report.chart import Line, chart, smoothed, thinned

if TYPE_CHECKING:
    from halfbyte.compare.cells import Cell
    from halfbyte.compare.job import Row
    from halfbyte.compare.weights import LayerReport

COLOURS = ("#1f5a91", "#c8553d", "#4a8f4f", "#8a5aa8", "#b8860b", "#4f8fc0", "#7d7d7d", "#d18a9c", "#2f4858")


def loss_picture(rows: Sequence[Row]) -> str:
    """Held-out loss after training, a point a seed, the mean and its interval."""
    figure, axis = _axes(0.55 * len(rows) + 1.2)
    for place, row in enumerate(rows):
        if row.after is None:
            continue
        colour = COLOURS[place % len(COLOURS)]
        axis.plot(row.losses, [place] * len(row.losses), "o", color=colour, alpha=0.45, markersize=5)
        axis.errorbar(row.after.value, place, xerr=row.after.half_width or 0, fmt="D", color=colour, capsize=5)
    axis.set(yticks=range(len(rows)), yticklabels=[row.name for row in rows], xlabel="held-out loss after training")
    axis.invert_yaxis()
    return _svg(figure)


def bytes_picture(rows: Sequence[Row]) -> str:
    """Held-out loss against the bytes of the base."""
    figure, axis = _axes(3.6)
    for place, row in enumerate(rows):
        if row.after is None or row.base_bytes is None:
            continue
        colour = COLOURS[place % len(COLOURS)]
        axis.errorbar(
            row.base_bytes / 1e6, row.after.value, yerr=row.after.half_width or 0, fmt="D", color=colour, capsize=4
        )
        axis.annotate(
            row.name, (row.base_bytes / 1e6, row.after.value), xytext=(7, 5), textcoords="offset points", color=colour
        )
    axis.set(xlabel="weights of the base while it trains, MB", ylabel="held-out loss")
    axis.margins(x=0.2, y=0.2)
    return _svg(figure)


def curves_picture(rows: Sequence[Row], cells: Mapping[str, Sequence[Cell]]) -> str:
    """Training loss over the steps of each variant's first seed, smoothed."""
    lines = []
    for place, row in enumerate(rows):
        first = next((cell.curve for cell in cells[row.name] if cell.curve), [])
        lines.append(Line(row.name, thinned(smoothed(first, 0.85)), place % len(COLOURS)))
    return chart("Training loss, smoothed", lines, x="step")


def cost_picture(rows: Sequence[Row]) -> str:
    """Seconds and peak memory of a run."""
    figure, axis = _axes(0.5 * len(rows) + 1.4)
    names = [row.name for row in rows]
    axis.remove()
    for column, (title, values) in enumerate((
        ("seconds of a run", [row.seconds or 0.0 for row in rows]),
        ("peak memory, GB", [(row.peak_memory or 0) / 1e9 for row in rows]),
    )):  # fmt: skip
        part = figure.add_subplot(1, 2, column + 1)
        bars = part.barh(names, values, color=[COLOURS[i % len(COLOURS)] for i in range(len(rows))], height=0.6)
        part.bar_label(bars, fmt="%.3g", padding=3)
        part.set_xlabel(title)
        part.invert_yaxis()
        part.margins(x=0.2)
        part.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def codes_picture(values: Sequence[float], histogram: Sequence[int], use: Sequence[float]) -> str:
    """Where weights lie between the codebook's values, and how often each code is used."""
    from halfbyte.compare.weights import LIMIT

    figure, axis = _axes(4.6)
    axis.remove()
    grid = figure.add_gridspec(2, 1, height_ratios=[3, 1])
    above = figure.add_subplot(grid[0])
    width = 2 * LIMIT / len(histogram)
    centers = [-LIMIT + (i + 0.5) * width for i in range(len(histogram))]
    above.fill_between(centers, histogram, step="mid", color=COLOURS[0], alpha=0.35)
    for value in values:
        above.axvline(value, color=COLOURS[1], linewidth=0.8)
    above.set(xlim=(-LIMIT, LIMIT), yticks=[], xlabel="weight / scale")
    below = figure.add_subplot(grid[1])
    below.bar(range(len(use)), [100 * share for share in use], color=COLOURS[0])
    below.set(xticks=range(len(use)), xlabel="code", ylabel="%")
    for part in (above, below):
        part.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def errors_picture(layers: Sequence[LayerReport]) -> str:
    """Each layer's error in the order of the model, a colour for each kind."""
    figure, axis = _axes(3.4)
    kinds = list(dict.fromkeys(layer.name.rpartition(".")[2] for layer in layers))
    for place, kind in enumerate(kinds):
        own = [layer.error for layer in layers if layer.name.rpartition(".")[2] == kind]
        axis.plot(
            range(len(own)), own, "o-", markersize=3, linewidth=1, color=COLOURS[place % len(COLOURS)], label=kind
        )
    axis.set(xlabel="number of the layer", ylabel="error", ylim=(0, None))
    axis.legend(frameon=False, ncols=4, fontsize=8)
    return _svg(figure)


def _axes(height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, height), layout="constrained")
    FigureCanvasSVG(figure)
    axis = figure.add_subplot()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    return figure, axis


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "halfbyte"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return "<svg class=plot" + text.getvalue().partition("<svg")[2]
