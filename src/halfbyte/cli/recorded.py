"""A training run on its way into the store of runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from halfbyte.config import RunConfig
from halfbyte.errors import HalfbyteError
from halfbyte.plan import Plan
from halfbyte.report.runs import Runs, StoreError
from halfbyte.train import Observer
from halfbyte.train.story import Story


class Recorded(Observer):
    """Notes a run's beginning, when its plan is made, and its end, when the ``with`` block is left.

    The store never stops a run: what is wrong with it is said once.

    Args:
        say: to whom.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._runs, self._say = Runs(path), say
        self._story: Story | None = None
        self._number: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._number is None or self._story is None:
            return
        interrupted = isinstance(error, KeyboardInterrupt)
        state = "finished" if error is None else "interrupted" if interrupted else "failed"
        line = "" if error is None or interrupted else _line(error)
        try:
            self._runs.end(self._number, self._story.report(), state, line)
        except StoreError as problem:
            self._say(f"halfbyte runs will not know how this run ended: {problem}")

    def on_begin(self, story: Story) -> None:
        self._story = story

    def on_plan(self, config: RunConfig, plan: Plan) -> None:
        if self._number is not None or self._story is None:
            return
        try:
            self._number = self._runs.begin(self._story.report(), Path(config.train.output).absolute())
        except StoreError as problem:
            self._say(f"halfbyte runs will not list this run: {problem}")


def _line(error: BaseException) -> str:
    return " ".join((str(error) if isinstance(error, HalfbyteError) else f"{type(error).__name__}: {error}").split())
