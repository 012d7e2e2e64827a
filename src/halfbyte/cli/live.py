"""A training run on a terminal: one view that draws itself anew, notes scrolling by above it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from halfbyte.data import Token
from halfbyte.dtypes import format_bytes
from halfbyte.report import RunReport
from halfbyte.report.chart import smoothed
from halfbyte.report.html import legible
from halfbyte.report.run import Shown
from halfbyte.report.run_page import duration
from halfbyte.report.unhurried import Unhurried
from halfbyte.train import Observer
from halfbyte.train.story import Story

EVERY = 2.0
"""Seconds between two drawings, of some ten milliseconds each."""
CURVE = (56, 6)
"""Columns and lines of the loss."""
BAR = 34
SAMPLE = 160
"""Characters of an answer."""
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Of a Braille character: by column, from above."""


class LiveView(Observer):
    """Draws a run inside a ``with`` block; nothing of it stays but the notes."""

    def __init__(self, console: Console) -> None:
        self._report: Callable[[], RunReport] | None = None
        self._now = ""
        self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=1 / EVERY, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def on_begin(self, story: Story) -> None:
        self._report = Unhurried(story.report, EVERY / 2)

    def on_phase(self, name: str) -> None:
        self._now = ""

    def load_progress(self, done: int, total: int, name: str) -> None:
        self._now = f"{done} of {total} tensors  {name}"

    def eval_progress(self, done: int, total: int) -> None:
        self._now = f"{done} of {total} held-out samples"

    def note(self, text: str) -> None:
        """Print the decision."""
        self._live.console.print(text, style="dim", markup=False)

    def on_save(self, path: Path) -> None:
        """Print what is complete on disk."""
        self._live.console.print(f"saved {path}", style="dim", markup=False)

    def _draw(self) -> RenderableType:
        return view(self._report(), self._now) if self._report else ""


def view(run: RunReport, now: str = "") -> RenderableType:
    """A run as a panel of some fifteen lines."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", justify="right")
    rows.add_column()
    if run.steps:
        rows.add_row("step", _with_bar(run.step, run.steps, f"{run.step:,} of {run.steps:,}{_left(run)}"))
    if run.loss:
        values = [loss for _, loss in smoothed(run.loss)]
        low, high = min(values), max(values)
        lines = curve(values, *CURVE)
        labels = [f" {high:.3f}", *[""] * (len(lines) - 2), f" {low:.3f}"]
        drawn = [Text.assemble((line, "cyan"), (label, "dim")) for line, label in zip(lines, labels, strict=True)]
        rows.add_row("loss", Text("\n").join(drawn))
        rows.add_row("", Text(f"{values[-1]:.4f} smoothed, {run.loss[-1][1]:.4f} in the last step"))
    if run.held_out:
        first, last = run.held_out[0][1], run.held_out[-1]
        change = f", {last[1] / first - 1:+.1%} since the first" if len(run.held_out) > 1 else ""
        rows.add_row("held-out", Text.assemble((f"{last[1]:.4f}", "bold"), f" after {last[0]:,.0f} steps{change}"))
    if run.tokens_per_s is not None:
        rows.add_row("speed", f"{run.tokens_per_s:,.0f} tokens/s, {run.speed[-1][1]:,.0f} learned in the last step")
    if run.memory:
        rows.add_row("memory", _memory(run))
    if run.answers:
        answer = run.answers[0]
        rows.add_row("asked", Text(_line(answer.prompt)))
        rows.add_row("answered", Text(_line(answer.after), "green"))
    elif run.samples:
        rows.add_row("a sample", _sample(run.samples[0]))
    title = Text(f" {legible(run.title)} · {run.state} · {duration(run.seconds)} ", "bold")
    return Panel(rows, title=title, title_align="left", subtitle=Text(now, "dim") if now else None, border_style="dim")


def curve(values: Sequence[float], width: int, height: int) -> list[str]:
    """`values` from left to right as dots of Braille characters, two across and four down in each."""
    columns, lines = 2 * width, 4 * height
    low, high = min(values), max(values)
    cells = [[0x2800] * width for _ in range(height)]
    before = None
    for x in range(columns):
        value = values[min(x * len(values) // columns, len(values) - 1)]
        share = (value - low) / (high - low) if high > low and math.isfinite(high - low) else 0.0
        y = round((1 - share) * (lines - 1)) if math.isfinite(share) else 0
        for dot in range(min(y, before if before is not None else y), max(y, before if before is not None else y) + 1):
            cells[dot // 4][x // 2] |= _DOTS[x % 2][dot % 4]
        before = y
    return ["".join(map(chr, line)) for line in cells]


def _sample(sample: Shown) -> Text:
    """The end of its context and the beginning of what is learned of it, which is green."""
    start = next((i for i, piece in enumerate(sample.pieces) if piece.learned), 0)
    before, learned = (_flat(part) for part in (sample.pieces[:start], sample.pieces[start:]))
    return Text.assemble((f"…{before[-SAMPLE // 2 :]}", "dim"), (learned[: SAMPLE // 2], "green"))


def _flat(pieces: Sequence[Token]) -> str:
    return "".join(piece.text for piece in pieces).replace("⏎\n", " ")


def _line(said: str) -> str:
    """The beginning of it, in one line."""
    return " ".join(legible(said).split())[:SAMPLE]


def _left(run: RunReport) -> str:
    if run.step_seconds is None or run.step == run.steps:
        return ""
    return f", {duration((run.steps - run.step) * run.step_seconds)} left"


def _memory(run: RunReport) -> RenderableType:
    """What is in use, of the budget or of what was planned."""
    size, plan = run.memory[-1][1], run.plan
    if plan is None:
        return format_bytes(size)
    of = f" of {format_bytes(plan.budget)}" if plan.budget else ""
    peak = f"{format_bytes(run.peak)} at most"
    return _with_bar(size, plan.budget or plan.peak_memory,
                     f"{format_bytes(size)}{of}, {peak}, {format_bytes(plan.peak_memory)} planned")  # fmt: skip


def _with_bar(done: float, total: float, text: str) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=BAR)
    grid.add_column()
    grid.add_row(ProgressBar(total=total, completed=min(done, total), width=BAR, complete_style="cyan"), Text(text))
    return grid
