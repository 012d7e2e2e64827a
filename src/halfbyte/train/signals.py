"""What signals ask of a run: SIGINT, SIGTERM and SIGHUP (the terminal has gone) to end after this step, a second one
at once; SIGUSR1 to save."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType, TracebackType
from typing import Any, Self

from halfbyte.train.observer import Observer
from halfbyte.train.ranks import ALONE, Ranks


class StoppedError(KeyboardInterrupt):
    """A signal ended the run.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


class Signals:
    """Listens inside a ``with`` block, in the main thread; signals that were ignored before stay so (nohup, shells).

    Args:
        ranks: which end and save after the same step, whichever of them is asked.

    Attributes:
        ending: the signal that asked the run to end.
        saving: a checkpoint is asked for.
    """

    def __init__(self, observer: Observer, ranks: Ranks = ALONE) -> None:
        self._observer, self._ranks = observer, ranks
        self._heard: int | None = None
        self._asked = False
        self._before: dict[int, Any] = {}
        self._patient = False
        self.ending: int | None = None
        self.saving = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
                number = getattr(signal, name, None)  # Windows lacks the last two
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def finishing_steps(self) -> Iterator[None]:
        """Inside the block the first signal only asks.

        Raises:
            StoppedError: at the block's end, where one asked.
        """
        self._patient = True
        yield
        self._patient = False
        if self.ending is not None:
            raise StoppedError(self.ending)

    def cut_short(self, work: Callable[[], None]) -> None:
        """Do `work`, within steps, which a signal ends at once: it can be done again. Ranks do it to its end."""
        together = self._ranks.world > 1
        self._patient = together
        with nullcontext() if together else suppress(StoppedError):
            if self.ending is None:
                work()
        self._patient = True

    def agree(self) -> None:
        """Between steps: `ending` and `saving` become what any rank has heard. One process alone knows it at once."""
        if self._ranks.world > 1:
            asked, self._asked = self._asked, False
            ending, saving = self._ranks.most(self._heard or 0, asked)
            self.ending, self.saving = int(ending) or None, bool(saving)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if number == getattr(signal, "SIGUSR1", None):
            self._asked = True
            self.saving = self._ranks.world == 1
        elif self._heard is not None:
            raise StoppedError(number)
        else:
            self._heard = number
            self.ending = number if self._ranks.world == 1 else self.ending
            if not self._patient:
                raise StoppedError(number)
            self._observer.note(
                f"{signal.Signals(number).name}: ending after this step with a checkpoint; once more ends at once"
            )
