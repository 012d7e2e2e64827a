"""Values that may be a little old, so that asking for them costs a fixed share of the time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
SHARE = 200
"""Making takes at most one part in so many of the time."""


class Unhurried(Generic[T]):
    """`make`, called anew when its value is `seconds` old, or `SHARE` times as long as it took; from any thread."""

    def __init__(self, make: Callable[[], T], seconds: float) -> None:
        self._make, self._seconds = make, seconds
        self._lock, self._values, self._until = threading.Lock(), list[T](), 0.0

    def __call__(self) -> T:
        """The value, as old as that at most."""
        with self._lock:
            began = time.monotonic()
            if not self._values or began > self._until:
                self._values[:] = [self._make()]
                ended = time.monotonic()
                self._until = ended + max(self._seconds, SHARE * (ended - began))
            return self._values[0]
