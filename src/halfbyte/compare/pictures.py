"""The page's pictures, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.compare.cells import Cell
    from halfbyte.compare.job import Row

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
    figure, axis = _axes(3.6)
    for place, row in enumerate(rows):
        done = [cell for cell in cells[row.name] if cell.curve]
        if done:
            steps, losses = zip(*done[0].curve, strict=True)
            axis.plot(steps, _smoothed(losses), color=COLOURS[place % len(COLOURS)], label=row.name, linewidth=1.5)
    axis.set(xlabel="step", ylabel="training loss, smoothed")
    axis.legend(frameon=False)
    return _svg(figure)


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
    return text.getvalue()[text.getvalue().index("<svg") :]


def _smoothed(values: Sequence[float], weight: float = 0.85) -> list[float]:
    result, average, norm = [], 0.0, 0.0
    for value in values:
        average, norm = weight * average + (1 - weight) * value, weight * norm + (1 - weight)
        result.append(average / norm)
    return result
