"""`WeightReport` as one HTML page that needs nothing else."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from halfbyte.compare.pictures import codes_picture, errors_picture
from halfbyte.report import page, table

if TYPE_CHECKING:
    from halfbyte.compare.weights import WeightReport


def weights_page(report: WeightReport) -> str:
    """The whole page."""
    lead = (
        f"{len(report.layers)} layers in {_formats(report)}, blocks of {report.layers[0].blocksize}: squared error "
        f"{report.error:.3e} of the weights' squared norm."
    )
    worst = sorted(report.layers, key=lambda layer: -layer.error)
    rows = [
        [escape(layer.name), " × ".join(map(str, layer.shape)), f"{layer.error:.2e}", f"{layer.worst_block:.2e}",
         f"{layer.clipped:.2%}", f"{layer.negative:.0%}"]
        for layer in worst
    ]  # fmt: skip
    head = ["layer", "shape", "error", "worst block", "clipped", "negative scales"]
    if any(layer.sensitivity is not None for layer in report.layers):
        head.append("KL alone in nf4")
        for row, layer in zip(rows, worst, strict=True):
            row.append("" if layer.sensitivity is None else f"{layer.sensitivity:.2e}")
    parts = [
        f"<h1>{escape(report.model)} in {_formats(report)}</h1><p class=soft>{escape(report.folder)}</p><p>{lead}</p>",
        _text(report),
        "<h2>Where the weights lie</h2>", codes_picture(report.values, report.histogram, report.use),
        "<p class=soft>Weights divided by their block's scale; lines are the codebook's values, bars below are how "
        "often each code is used. A weight beyond the outer lines is clipped.</p>",
        "<h2>Error by layer</h2>", errors_picture(report.layers),
        "<h2>Layers, the worst first</h2>", table(head, rows, "long"),
        "<p class=soft>Error: squared error over the squared norm. A small error of the weights is not yet a small "
        "loss: what counts is the perplexity above.</p>",
    ]  # fmt: skip
    return page("halfbyte quantize", parts)


def _formats(report: WeightReport) -> str:
    return ", ".join(dict.fromkeys(layer.quant_type.upper() for layer in report.layers))


def _text(report: WeightReport) -> str:
    if report.perplexity is None or report.perplexity_16bit is None:
        return f"<p class=soft>Perplexity: {escape(report.note)}</p>"
    change = report.perplexity / report.perplexity_16bit - 1
    here = f"<b>{report.perplexity:.3f}</b> in {_formats(report)} ({change:+.1%})"
    return (
        f"<p>Perplexity on <code>{escape(report.text)}</code>: <b>{report.perplexity_16bit:.3f}</b> in 16 bits, "
        f"{here}; loss {report.loss_16bit:.4f} and {report.loss:.4f}.</p>"
    )
