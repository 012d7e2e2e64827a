"""A thread that looks at resident memory while a run goes on, and acts before the budget is exceeded."""

from __future__ import annotations

import ctypes as ct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from halfbyte.dtypes import format_bytes
from halfbyte.errors import ResourceError
from halfbyte.kernels.buffers import Buffers, trim_heap
from halfbyte.model.memory import resident_memory
from halfbyte.plan import Budget, Plan, of_rank
from halfbyte.train.observer import Observer

INTERVAL = 0.02
"""Seconds between looks; one takes 20 microseconds."""
TRIM_AT, SHRINK_AT, STOP_AT = 0.98, 0.995, 1.0
"""Of the budget, all of which a plan may use: unused memory is given back, a buffer of the ring, the run stops."""
REST = 5.0
"""Seconds until unused memory is given back again: what is given back has to be touched anew."""


class Watchdog:
    """Watches inside a ``with`` block, from `start` on; the block must be left by the thread that entered it.

    At 98 % of the budget it gives back what the buffers and glibc keep unused, and where 99.5 % are still in use, a
    buffer of the streamed layers. Beyond the budget it interrupts the thread that entered, and the block ends with a
    ResourceError (exit 4); checkpoints that were saved are whole.

    Attributes:
        trims: how often memory was given back.
        shrink: gives back more, at the price of speed; returns how much that was.
    """

    def __init__(self, budget: Budget | None, buffers: Buffers, observer: Observer) -> None:
        self._budget, self._buffers, self._observer = budget, buffers, observer
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="halfbyte-memory", daemon=True)
        self._seen = 0
        self._stopped = False
        self.trims = 0
        self.shrink: Callable[[], int] = lambda: 0

    def __enter__(self) -> Self:
        self._owner = threading.get_ident()
        return self

    def start(self, made: Plan | None = None) -> None:
        """Begin to look: once there is a plan, which has the better words for a budget that is too small.

        Args:
            made: says how many ranks share the budget, and what of their memory is the same.
        """
        if self._budget is not None:
            if made is not None:
                self._budget = of_rank(self._budget, made.ranks, made.shared)
            self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._stopped:
            self._interrupt_with(None)  # what is still on its way must not arrive after the block
        if self._stopped and (error is None or isinstance(error, KeyboardInterrupt)):
            raise self._error() from None

    def check(self) -> None:
        """Between two steps, where an interrupt may still be on its way.

        Raises:
            ResourceError: the budget was exceeded.
        """
        if self._stopped:
            raise self._error()

    def _watch(self) -> None:
        assert self._budget is not None
        pause = INTERVAL
        while not self._done.wait(pause):
            pause = INTERVAL
            self._seen = resident_memory()
            if self._seen < TRIM_AT * self._budget.bytes:
                continue
            self._buffers.release()
            trim_heap()
            self.trims += 1
            after = resident_memory()
            if after > SHRINK_AT * self._budget.bytes and self.shrink():
                after = resident_memory()
            if after > STOP_AT * self._budget.bytes:
                self._stopped = True
                self._interrupt_with(ct.py_object(KeyboardInterrupt))
                return
            self._observer.note(
                f"memory: {format_bytes(self._seen)} of {format_bytes(self._budget.bytes)} in use; "
                f"{format_bytes(max(self._seen - after, 0))} were given back"
            )
            pause = REST if after > TRIM_AT * self._budget.bytes else INTERVAL

    def _interrupt_with(self, kind: ct.py_object[type[KeyboardInterrupt]] | None) -> None:
        """As Ctrl-C would; a signal is not it, for a run in the background of a shell ignores SIGINT."""
        ct.pythonapi.PyThreadState_SetAsyncExc(ct.c_ulong(self._owner), kind)

    def _error(self) -> ResourceError:
        assert self._budget is not None
        return ResourceError(
            f"{format_bytes(self._seen)} are in use, {format_bytes(self._budget.bytes)} are allowed",
            where=self._budget.source, why="the run was stopped before the system would have; checkpoints are whole",
            fix="Give --memory more, or lower data.max_seq_len, train.micro_batch_size or lora.r",
        )  # fmt: skip
