"""The places behind the fast memory, in order of speed: host memory behind a device's, and files."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

from torch import Tensor

from halfbyte.dtypes import format_bytes
from halfbyte.store.direct_io import DirectFile
from halfbyte.store.memory import Memory

STAGING_BYTES = 1 << 23
"""The piece in which bytes pass between a file and a device: a disk is at full speed with less."""


class Staging:
    """The way between files and the fast memory: straight into host memory, else by way of a piece of it.

    Args:
        memory: the fast one.
        most: bytes that ever pass at a time, if that is known.
    """

    def __init__(self, memory: Memory, most: int = STAGING_BYTES) -> None:
        self._memory, self._piece_bytes = memory, min(most, STAGING_BYTES)
        self._pieces = SimpleQueue[Tensor]()

    def read(self, file: DirectFile, start: int, target: Tensor) -> None:
        """Fill `target`, uint8 in the fast memory, from the bytes at `start`; done on return."""
        if self._memory.is_host:
            return file.read_into(target, start)
        with self._piece() as piece:
            for part in target.split(self._piece_bytes):
                file.read_into(piece[: len(part)], start)
                self._memory.copy(part, piece[: len(part)])
                start += len(part)

    def write(self, file: DirectFile, start: int, source: Tensor) -> None:
        """Write `source`, uint8 in the fast memory, to the bytes at `start`; done on return."""
        if self._memory.is_host:
            return file.write_from(source, start)
        with self._piece() as piece:
            for part in source.split(self._piece_bytes):
                self._memory.copy(piece[: len(part)], part)
                file.write_from(piece[: len(part)], start)
                start += len(part)

    @contextmanager
    def _piece(self) -> Iterator[Tensor]:
        """One for each worker that is at it."""
        try:
            piece = self._pieces.get_nowait()
        except Empty:
            piece = self._memory.allocate_host(self._piece_bytes)
        try:
            yield piece
        finally:
            self._pieces.put(piece)


class Tier(Protocol):
    """A place for bytes behind the fast memory. New ones are zeros."""

    capacity: int
    """Bytes it may hold."""

    @property
    def nbytes(self) -> int:
        """What it takes."""

    def grow(self, nbytes: int) -> None:
        """Have room for `nbytes`, or raise. What is added is one piece: no read and no write goes over its ends."""

    def read(self, start: int, target: Tensor) -> None:
        """Fill `target`, uint8 in the fast memory; done on return."""

    def write(self, start: int, source: Tensor) -> None:
        """Keep `source`, uint8 in the fast memory; done on return."""

    def close(self) -> None:
        """Give everything back."""


class HostTier:
    """Host memory behind a device's, `capacity` bytes of it at most."""

    def __init__(self, memory: Memory, capacity: int) -> None:
        self.capacity = capacity
        self._memory, self._starts, self._pieces = memory, list[int](), list[Tensor]()

    @property
    def nbytes(self) -> int:
        return self._starts[-1] + self._pieces[-1].nbytes if self._pieces else 0

    def grow(self, nbytes: int) -> None:
        end = self.nbytes
        if nbytes > end:
            self._pieces.append(self._memory.allocate_host(nbytes - end))
            self._starts.append(end)

    def read(self, start: int, target: Tensor) -> None:
        self._memory.copy(target, self._at(start, target.nbytes))

    def write(self, start: int, source: Tensor) -> None:
        self._memory.copy(self._at(start, source.nbytes), source)

    def close(self) -> None:
        self._pieces.clear()
        self._starts.clear()

    def __str__(self) -> str:
        return f"{format_bytes(self.nbytes)} in host memory"

    def _at(self, start: int, nbytes: int) -> Tensor:
        number = bisect_right(self._starts, start) - 1
        first = start - self._starts[number]
        return self._pieces[number][first : first + nbytes]


class DiskTier:
    """A scratch file in `folder`, its room taken before it is needed."""

    capacity = 1 << 62

    def __init__(self, memory: Memory, folder: str | Path, most: int = STAGING_BYTES) -> None:
        self._folder, self._staging = folder, Staging(memory, most)
        self._file: DirectFile | None = None

    @property
    def nbytes(self) -> int:
        return self._file.nbytes if self._file else 0

    def grow(self, nbytes: int) -> None:
        if self._file is None:
            self._file = DirectFile.scratch(self._folder, nbytes)
        else:
            self._file.grow(nbytes)

    def read(self, start: int, target: Tensor) -> None:
        assert self._file is not None
        self._staging.read(self._file, start, target)

    def write(self, start: int, source: Tensor) -> None:
        assert self._file is not None
        self._staging.write(self._file, start, source)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __str__(self) -> str:
        return f"{format_bytes(self.nbytes)} in {self._folder}" + (f" ({self._file.why})" if self._file else "")


def tiers_behind(
    memory: Memory, host_budget: int, folder: str | Path, most: int = STAGING_BYTES
) -> list[HostTier | DiskTier]:
    """What is behind `memory`: `host_budget` bytes of the host's where it is a device's, then a file in `folder`.

    Args:
        most: bytes that are read or written at a time, if that is known.
    """
    host = [] if memory.is_host else [HostTier(memory, host_budget)]
    return [*host, DiskTier(memory, folder, most)]
