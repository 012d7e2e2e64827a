"""Who hears of a training run: the terminal, a page on loopback, the list of runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console

from halfbyte.cli.common import runs_file
from halfbyte.cli.live import LiveView
from halfbyte.cli.progress import PlainLines
from halfbyte.cli.recorded import Recorded
from halfbyte.config import RunConfig
from halfbyte.report import Dashboard
from halfbyte.train import Observer, Observers
from halfbyte.train.story import Story


class Shown(Observer):
    """Gives a run's story to its dashboard."""

    def __init__(self, dashboard: Dashboard) -> None:
        self._dashboard = dashboard

    def on_begin(self, story: Story) -> None:
        self._dashboard.report = story.report


@contextmanager
def watched(run: RunConfig, out: Console, *, port: int | None = None) -> Iterator[Observer]:
    """The observer of `run` that tells all who are to hear of it.

    Args:
        port: of the dashboard; None: there is none.

    Raises:
        ConfigError: the port is not to be had.
    """
    with ExitStack() as stack:
        listeners: list[Observer] = []
        kind = run.log.progress
        if kind == "live" or (kind == "auto" and out.is_terminal and not out.is_dumb_terminal):
            listeners.append(stack.enter_context(LiveView(out)))
        elif kind != "none":
            listeners.append(PlainLines(out))
        if port is not None:
            dashboard = stack.enter_context(Dashboard(port))
            listeners.append(Shown(dashboard))
            out.print(f"dashboard: {dashboard.url}", markup=False)
        recorded = Recorded(runs_file(), lambda text: out.print(text, style="dim", markup=False))
        listeners.append(stack.enter_context(recorded))
        yield Observers(*listeners)
