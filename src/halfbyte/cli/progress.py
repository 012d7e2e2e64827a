"""Progress in lines, for logs, and a bar while a model is loaded; cli/live.py draws a training run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from halfbyte.dtypes import format_bytes
from halfbyte.train import Observer, StepMetrics

PLAIN_EVERY = 5.0
"""Seconds between lines where there is no terminal."""


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"), console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip


class LoadBar:
    """A bar over the tensors of a base model while it is quantized."""

    def __init__(self, console: Console) -> None:
        self._progress = _bars(console)
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def update(self, done: int, total: int, name: str) -> None:
        """`done` of `total` tensors; `name` comes next."""
        if self._task is None:
            self._task = self._progress.add_task("loading", total=total, info="")
        self._progress.update(self._task, completed=done, info=name)


class PlainLines(Observer):
    """A line for every note, and for a step now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_line = 0.0
        self._loss: float | None = None

    def note(self, text: str) -> None:
        """Print the decision."""
        self._console.print(text, style="dim", markup=False)

    def on_eval(self, step: int, loss: float) -> None:
        """Print the held-out loss."""
        self._console.print(f"held-out loss after {step} steps: [bold]{loss:.4f}[/]")

    def on_save(self, path: Path) -> None:
        """Print what is complete on disk."""
        self._console.print(f"saved {path}", style="dim", markup=False)

    def on_step(self, m: StepMetrics) -> None:
        """Print a line now and then."""
        self._loss = m.loss if self._loss is None else 0.9 * self._loss + 0.1 * m.loss
        if m.step not in (1, m.steps) and time.monotonic() - self._last_line < PLAIN_EVERY:
            return
        self._last_line = time.monotonic()
        self._console.print(
            f"step {m.step}/{m.steps}  smoothed loss {self._loss:.3f}  lr {m.lr:.1e}  "
            f"{m.tokens / m.seconds:,.0f} tok/s ({m.supervised_tokens / m.seconds:,.0f} learned)  "
            f"{format_bytes(m.memory)}  {(m.steps - m.step) * m.seconds:,.0f} s left", markup=False,
        )  # fmt: skip
