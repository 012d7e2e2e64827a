"""Large tensors in memory that is used again: few pages are touched for the first time, none is held beyond need.

glibc gives the memory of a large tensor back to the system, or keeps it in a heap with holes, by a rule that moves
with what was freed before. The first costs a page fault for every 4 KB of every tensor (float32 steps of SmolLM2-135M
took 1.3 times as long), the second makes resident memory drift above what is allocated (by 11 % there). Inside
`steady_memory` the operators' results of 32 KB and more live in mappings of our own instead.

The rule: what is mapped never exceeds the most that was in use at once. Until then nothing is given back; where a new
mapping would exceed it, unused ones are given back first, then the unused ends of used ones.
"""

from __future__ import annotations

import ctypes as ct
import mmap
import sys
import weakref
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from threading import Lock

import torch
from torch import Tensor

LEAST_BYTES = 32 * 1024
"""Smaller tensors are torch's business."""
MOST_WASTE = 2
"""A mapping serves a tensor of at least this part (1/2) of its size."""
PAGE = mmap.PAGESIZE
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class _Mapping:
    """Anonymous memory: `size` bytes of address space, of which up to `resident` may be in memory."""

    __slots__ = ("memory", "resident", "size", "used")

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size, **_PRIVATE)
        self.size = self.resident = size
        self.used = 0
        if hasattr(mmap, "MADV_HUGEPAGE") and size >= 2 << 20:
            self.memory.madvise(mmap.MADV_HUGEPAGE)

    def __lt__(self, other: _Mapping) -> bool:
        return self.size < other.size

    def trim(self) -> int:
        """Give back what lies behind the used part; how much that was."""
        end = -(-self.used // PAGE) * PAGE
        freed = max(self.resident - end, 0)
        if freed:
            self.memory.madvise(mmap.MADV_DONTNEED, end, self.size - end)
            self.resident = end
        return freed


class Buffers:
    """Mappings in use and free ones.

    Attributes:
        live: bytes of the tensors in use.
        most: most of these at any time.
        resident: bytes mapped and perhaps in memory.
    """

    def __init__(self) -> None:
        self.live = self.most = self.resident = 0
        self._free: list[_Mapping] = []  # by size
        self._used: dict[int, tuple[weakref.ref[object], _Mapping]] = {}
        self._lock = Lock()
        self._returned: deque[int] = deque()  # filled by the garbage collector, at any time and in any thread

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized contiguous CPU tensor of at least `LEAST_BYTES`."""
        count = prod(shape)
        with self._lock:
            return self._lend(count, dtype).view(*shape)

    def _lend(self, count: int, dtype: torch.dtype) -> Tensor:
        mapping = self._take(count * dtype.itemsize)
        lease = (ct.c_char * mapping.size).from_buffer(mapping.memory)  # lives as long as the tensor's storage
        self._used[id(mapping)] = weakref.ref(lease, partial(self._died, id(mapping))), mapping
        return torch.frombuffer(lease, dtype=dtype, count=count)

    def _died(self, key: int, _: object) -> None:
        self._returned.append(key)

    def _take(self, size: int) -> _Mapping:
        self._take_back()
        self.live += size
        self.most = max(self.most, self.live)
        rounded = -(-size // PAGE) * PAGE
        at = bisect_left(self._free, rounded, key=lambda mapping: mapping.size)
        if at < len(self._free) and self._free[at].size <= MOST_WASTE * rounded:
            mapping = self._free.pop(at)
            self._make_room(max(rounded - mapping.resident, 0))
            self.resident += max(rounded - mapping.resident, 0)
            mapping.resident = max(mapping.resident, rounded)
        else:
            self._make_room(rounded)
            mapping = _Mapping(rounded)
            self.resident += rounded
        mapping.used = size
        return mapping

    def _take_back(self) -> None:
        while self._returned:
            _, mapping = self._used.pop(self._returned.popleft())
            self.live -= mapping.used
            mapping.used = 0
            insort(self._free, mapping)

    def _make_room(self, size: int) -> None:
        """So that `size` bytes more are not beyond the most that was ever in use."""
        while self._free and self.resident + size > self.most:
            excess = self.resident + size - self.most  # one mapping of this size if there is one, else the largest
            at = bisect_left(self._free, excess, key=lambda mapping: mapping.resident)
            self._drop(self._free.pop(min(at, len(self._free) - 1)))
        for _, mapping in list(self._used.values()) if self.resident + size > self.most else ():
            self.resident -= mapping.trim()

    def _drop(self, mapping: _Mapping) -> None:
        self.resident -= mapping.resident  # the last reference: it is unmapped

    def release(self) -> int:
        """Give everything unused back to the system; how much that was."""
        with self._lock:
            self._take_back()
            before = self.resident
            self._free.clear()
            self.resident = 0
            for _, mapping in self._used.values():
                mapping.trim()
                self.resident += mapping.resident
            self.most = self.live
            return before - self.resident


_current: Buffers | None = None
"""Of the `steady_memory` that is entered: operators must find it, and they are called by torch."""


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized contiguous CPU tensor."""
    if _current is None or prod(shape) * dtype.itemsize < LEAST_BYTES:
        return torch.empty(shape, dtype=dtype)
    return _current.empty(shape, dtype)


def empty_like(x: Tensor) -> Tensor:
    """An uninitialized contiguous CPU tensor of the shape and dtype of `x`."""
    return empty(x.shape, x.dtype)


def release_unused() -> int:
    """Give back what the buffers of the current `steady_memory` do not use; how much that was."""
    return 0 if _current is None else _current.release()


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
MMAP_THRESHOLD = 1 << 20
"""From this size on glibc maps a tensor by itself and gives it back when it dies; left alone it moves up to 32 MB."""


@contextmanager
def steady_memory() -> Iterator[Buffers]:
    """Inside this block resident memory follows what is allocated.

    Large results of halfbyte's operators are put where earlier ones lay (see this module), and glibc is told, for the
    rest of the process, to give every other large tensor back when it dies and to keep one heap. `halfbyte.train` runs
    inside such a block by itself.

    Yields:
        the buffers: `.release()` gives back what is unused at the moment.
    """
    global _current
    fix_allocator()
    before, _current = _current, _current or Buffers()
    try:
        yield _current
    finally:
        _current.release()
        _current = before


def fix_allocator() -> None:
    """Stop glibc's mmap threshold from moving; nothing where another C library serves."""
    if not sys.platform.startswith("linux"):
        return
    libc = ct.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version"):
        for setting, value in (
            (_M_MMAP_THRESHOLD, MMAP_THRESHOLD), (_M_TRIM_THRESHOLD, 2 * MMAP_THRESHOLD), (_M_ARENA_MAX, 1),
        ):  # fmt: skip
            libc.mallopt(setting, value)


def trim_heap() -> None:
    """Give what glibc keeps of freed memory back to the system."""
    libc = ct.CDLL(None) if sys.platform.startswith("linux") else None
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
