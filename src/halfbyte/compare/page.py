"""The comparison as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from halfbyte.compare.pictures import bytes_picture, cost_picture, curves_picture, loss_picture
from halfbyte.dtypes import format_bytes
from halfbyte.report import page

if TYPE_CHECKING:
    from halfbyte.compare.cells import Cell
    from halfbyte.compare.job import Comparison, Row
    from halfbyte.compare.statistics import Mean


def comparison_page(result: Comparison, cells: Mapping[str, Sequence[Cell]], settings: Sequence[str]) -> str:
    """The whole page.

    Args:
        cells: the runs by variant.
        settings: those that all variants share.
    """
    rows = result.rows
    parts = [
        f"<h1>{' · '.join(escape(row.name) for row in rows)}</h1>",
        f"<p class=soft>{_seeds(result)}, {result.seconds / 60:.0f} minutes. Losses are per learned token, on samples "
        "that were held out; ± is the 95&nbsp;% confidence interval of the mean over seeds.</p>",
        _table(rows), _verdicts(rows),
        "<h2>Held-out loss after training</h2>", loss_picture(rows),
        "<h2>Loss against the bytes of the base</h2>", bytes_picture(rows),
        "<h2>What a run costs</h2>", cost_picture(rows),
        "<h2>Training</h2>", curves_picture(rows, cells),
        _samples(rows, cells), _how(rows, settings),
    ]  # fmt: skip
    return page("halfbyte compare", parts)


def _seeds(result: Comparison) -> str:
    fewest, most = (f([len(row.seeds) for row in result.rows]) for f in (min, max))
    count = f"{most} seed{'s' * (most != 1)}" if fewest == most else f"{fewest} to {most} seeds"
    return count + (f" ({result.wanted_seeds} were asked for)" if fewest < result.wanted_seeds else "")


def interval(figure: Mean | None, sign: str = "") -> str:
    """`figure` with its half width, where it is known."""
    if figure is None:
        return ""
    width = "" if figure.half_width is None else f" ± {figure.half_width:.4f}"
    return f"{figure.value:{sign}.4f}{width}"


def verdict(row: Row, reference: str) -> str:
    """What the difference from the reference comes to, in words."""
    if row.failed and not row.seeds:
        return f"did not run: {row.failed}"
    if row.difference is None:
        return f"what the others are compared with; {reference} itself"
    if row.difference.half_width is None:
        return f"{interval(row.difference, '+')} against {reference}: one seed says nothing of chance"
    if not row.difference.real:
        return f"{interval(row.difference, '+')} against {reference}: no difference that these seeds can tell"
    return f"{interval(row.difference, '+')} against {reference}: {'higher' if row.difference.value > 0 else 'lower'}"


def _table(rows: Sequence[Row]) -> str:
    lowest = min((row.after.value for row in rows if row.after), default=None)
    lines = []
    for row in rows:
        if row.after is None:
            lines.append(f"<tr><td>{_name(row)}<td colspan=8>did not run: {escape(row.failed)}")
            continue
        prepared = f" + {row.prepare_seconds:,.0f}" if row.prepare_seconds else ""
        values = [
            str(len(row.seeds)), f"{row.before:.4f}", interval(row.after), interval(row.difference, "+"),
            format_bytes(row.base_bytes) if row.base_bytes else "", format_bytes(row.peak_memory or 0),
            f"{row.tokens_per_s:,.0f}", f"{row.seconds:,.0f}{prepared}",
        ]  # fmt: skip
        best = " class=best" if row.after.value == lowest else ""
        lines.append(f"<tr{best}><td>{_name(row)}" + "".join(f"<td>{value}" for value in values))
    head = ["", "seeds", "loss before", "after", "difference", "base", "peak memory", "tokens/s", "seconds"]
    top = "".join(f"<th>{name}" for name in head)
    return f"<div class=wide><table class=long><tr>{top}{''.join(lines)}</table></div>"


def _name(row: Row) -> str:
    return f"{escape(row.name)}<br><small>{escape(row.about)}</small>"


def _verdicts(rows: Sequence[Row]) -> str:
    lines = [f"<li><b>{escape(row.name)}</b>: {escape(verdict(row, rows[0].name))}" for row in rows[1:]]
    return f"<h2>Which differences are real</h2><ul>{''.join(lines)}</ul>" + (
        "<p class=soft>Paired by seed: the same seed gives every variant the same samples in the same order. A "
        "difference is called real where its 95&nbsp;% interval (Student) leaves out zero.</p>"
    )


def _samples(rows: Sequence[Row], cells: Mapping[str, Sequence[Cell]]) -> str:
    answers = {row.name: cells[row.name][0].result.get("answers", []) for row in rows if row.seeds}
    first: list[dict[str, str]] = next((found for found in answers.values() if found), [])
    parts = []
    for number, sample in enumerate(first):
        said = [("expected", sample["expected"])]
        said += [(name, found[number]["after"]) for name, found in answers.items() if number < len(found)]
        texts = "".join(f"<b>{escape(who)}</b><blockquote>{escape(text)}</blockquote>" for who, text in said)
        parts.append(f"<details open><summary>{escape(sample['prompt'])}</summary>{texts}</details>")
    return "<h2>Held-out prompts, answered after training</h2>" + "".join(parts) if parts else ""


def _how(rows: Sequence[Row], settings: Sequence[str]) -> str:
    own = "".join(
        f"<li><b>{escape(row.name)}</b> <code>{escape(' '.join(row.settings)) or 'nothing more'}</code>"
        for row in rows
    )
    shared = escape(" ".join(settings))
    return f"<h2>Settings</h2><p>All: <code>{shared}</code></p><ul>{own}</ul><p class=soft>Figures: compare.json.</p>"
