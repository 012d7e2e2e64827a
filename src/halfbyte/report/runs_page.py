"""Runs beside each other, as a page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from halfbyte.dtypes import format_bytes
from halfbyte.report.chart import Line, chart, smoothed
from halfbyte.report.html import page, table, text
from halfbyte.report.run_page import duration
from halfbyte.report.runs import Kept

HEAD = (
    "id", "state", "model", "begun", "steps", "held-out loss", "training loss", "tokens/s", "peak", "planned", "time",
)  # fmt: skip
SHORT_HEAD = ("id", "state", "model", "begun", "steps", "held-out loss", "time")
"""What fits 80 columns."""


def differences(runs: Sequence[Kept]) -> dict[str, list[Any]]:
    """Settings that are not the same in all, with each one's value, None where it has none."""
    flat = [{f"{s}.{k}": value for s, part in run.config.items() for k, value in part.items()} for run in runs]
    names = dict.fromkeys(name for one in flat for name in one)
    found = {name: [one.get(name) for one in flat] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def row_of(run: Kept) -> list[str]:
    """A run as a row under `HEAD`."""
    of = run.figures
    held_out = [of.get("eval_loss_before"), of.get("eval_loss")]
    losses = " → ".join(f"{loss:.4f}" for loss in held_out if loss is not None)
    return [
        str(run.id), run.state, run.title, _date(run.started, "%Y-%m-%d %H:%M"),
        f"{of.get('step') or 0:,}/{of.get('steps') or 0:,}", losses,
        _number(of.get("train_loss"), "{:.4f}"), _number(of.get("tokens_per_s"), "{:,.0f}"),
        _size(of.get("peak_memory")), _size(of.get("predicted_peak_memory")), duration(of.get("seconds") or 0),
    ]  # fmt: skip


def short_row_of(run: Kept) -> list[str]:
    """A run as a row under `SHORT_HEAD`."""
    row = dict(zip(HEAD, row_of(run), strict=True)) | {"begun": _date(run.started, "%m-%d %H:%M")}
    return [row[name] for name in SHORT_HEAD]


def runs_page(runs: Sequence[Kept]) -> str:
    """The whole page."""
    names = [f"{run.id} {run.title}" for run in runs]
    curves = [
        chart("Training loss, smoothed", _lines(runs, "loss", smooth=True), x="step"),
        chart("Held-out loss", _lines(runs, "held_out"), x="step"),
        chart("Memory", _lines(runs, "memory"), x="seconds", zero=True, shown=lambda size: _size(size) or "0"),
    ]  # fmt: skip
    changed = [[text(name), *(text(value) for value in values)] for name, values in differences(runs).items()]
    errors = "".join(f"<li>{run.id}: {text(run.error)}" for run in runs if run.error)
    parts = [
        f"<h1>{' · '.join(map(text, names))}</h1>",
        table(HEAD, [[text(cell) for cell in row_of(run)] for run in runs]),
        f"<ul>{errors}</ul>" if errors else "", f"<div class=grid>{''.join(curves)}</div>",
        "<h2>Settings that differ</h2>",
        table(["", *map(text, names)], changed, "names") if changed else "<p>None.</p>",
    ]  # fmt: skip
    return page("halfbyte runs", parts)


def _lines(runs: Sequence[Kept], name: str, *, smooth: bool = False) -> list[Line]:
    lines = []
    for place, run in enumerate(runs):
        points = [(x, y) for x, y in run.curves.get(name, [])]
        look = "dots" if name == "held_out" else ""
        lines.append(Line(f"{run.id} {run.title}", smoothed(points) if smooth else points, place % 9, look))
    return lines


def _date(seconds: float, form: str) -> str:
    return time.strftime(form, time.localtime(seconds))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _size(value: float | None) -> str:
    return "" if not value else format_bytes(value)
