"""Memory in use over the time of a run: a thread that looks, and a bounded list of what it saw."""

from __future__ import annotations

import threading
import time
from array import array
from types import TracebackType
from typing import Self

import torch

from halfbyte.train.gpu import in_use

INTERVAL = 0.1
"""Seconds between looks; one takes 50 microseconds."""
MOST_BUCKETS = 1024


class MemoryTrace:
    """Looks inside a ``with`` block. Each bucket holds the most of its time; when there are too many, two become one.

    Attributes:
        peaks: most in use by phase.
        phases: (second, name) of what began when; neighbours differ.
    """

    def __init__(self, device: torch.device, *, interval: float = INTERVAL) -> None:
        self._device, self._interval = device, interval
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="halfbyte-trace", daemon=True)
        self._started = time.perf_counter()
        self._buckets = array("q", bytes(8 * MOST_BUCKETS))  # of one size: a list that grows would split up the heap
        self._width = interval
        self.peaks: dict[str, int] = {}
        self.phases: list[tuple[float, str]] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self._started

    def points(self) -> list[tuple[float, int]]:
        """(second, most bytes in use around it)."""
        with self._lock:
            return [((i + 1) * self._width, size) for i, size in enumerate(self._buckets) if size]

    def enter(self, phase: str) -> None:
        """A phase begins; what is in use now counts for it and for the one before."""
        self.look()
        if not self.phases or self.phases[-1][1] != phase:
            self.phases.append((self.seconds, phase))
        self.look()

    def look(self) -> None:
        """What is in use now."""
        size = in_use(self._device)
        with self._lock:
            at = int(self.seconds / self._width)
            while at >= MOST_BUCKETS:
                for i in range(MOST_BUCKETS):
                    self._buckets[i] = max(self._buckets[2 * i : 2 * i + 2], default=0)
                self._width *= 2
                at //= 2
            self._buckets[at] = max(self._buckets[at], size)
            if self.phases:
                name = self.phases[-1][1]
                self.peaks[name] = max(self.peaks.get(name, 0), size)

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self.look()
